"""Jobs, models and folders for tests of the server's rooms."""

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeboost.serving.jobs import Call, Job, Kind, ModelCard, Result
from pipeboost.serving.store import new_id

CARD = ModelCard(
    pipeline="DemoPipeline",
    kind="image",
    one_frame=False,
    parameters=("prompt", "negative_prompt", "guidance_scale"),
    size_multiple=8,
    width=512,
    height=512,
    num_frames=1,
    num_inference_steps=20,
    needs_image=False,
    several_images=False,
    takes_mask=False,
    quality="lossless",
    plan="abc",
    loras=True,
)
RESULT = Result(("0.png",), (7,), "abc", 20, 2.5, {"denoise": 2.0}, 512, 512)


def make_job(owner: str = "anna", kind: Kind = "image", **values: Any) -> Job:
    """Return a job that waits."""
    job = Job(new_id(kind), owner, kind, Call("a cat", 7), {"output_format": "png"}, "queued", time.time(), 1.0)
    return replace(job, **values)


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a disk with that much room left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
