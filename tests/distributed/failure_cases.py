"""What the ranks run in `test_failures`."""

import os
import signal
import threading
import time
from typing import Any

import torch

from pipeboost.distributed import Mesh, world
from pipeboost.distributed.watch import tell_stage, watched
from pipeboost.errors import PipeboostError

PLACES = {"start": "text encoding", "middle": "denoising", "operator": "denoising", "end": "decoding"}
"""Where a rank may fail in `script`, and the stage that it is in there."""


class Trouble:
    """What befalls one rank at one place."""

    def __init__(self, kind: str, rank: int, place: str) -> None:
        self.kind = kind
        self.rank = rank
        self.place = place

    def at(self, place: str) -> None:
        """Happens here, if this is the rank and the place."""
        if place != self.place or (self.rank >= 0 and world().rank != self.rank):
            return
        if self.kind == "raise":
            raise ValueError(f"boom on rank {world().rank}")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "exit":
            os._exit(3)
        if self.kind == "sleep":
            time.sleep(600)


_trouble = Trouble("none", 0, "")


@torch.library.custom_op("pipeboost_tests::troubled", mutates_args=())
def troubled(tensor: torch.Tensor) -> torch.Tensor:
    """An operator in which a rank may fail."""
    _trouble.at("operator")
    return tensor.clone()


def script(mesh: Mesh, trouble: Trouble, timeout: float) -> float:
    """A call as pipelines make them: some stages, with collectives of all kinds in between."""
    global _trouble
    _trouble = trouble
    stage = "text encoding"

    def enter(name: str) -> None:
        nonlocal stage
        stage = name
        tell_stage(mesh)

    with watched(mesh, stage=lambda: stage, timeout=timeout):
        group = mesh.group("ulysses")
        trouble.at("start")
        mesh.control.broadcast_object("prompt")
        enter("denoising")
        latents = torch.ones(2)
        for _ in range(3):
            latents = group.all_reduce(latents) / group.size
            trouble.at("middle")
            pending = group.shift([latents], [incoming := torch.empty(2)])
            latents = troubled(latents)
            pending.wait()
            latents = group.all_gather(incoming, 0, [2] * group.size)[:2]
        enter("decoding")
        trouble.at("end")
        time.sleep(0.05)
        return latents.sum().item()


def failing_call(size: int, kind: str, rank: int, place: str, timeout: float) -> dict[str, Any]:
    """A call in which one rank fails (all if `rank` is -1), and the next one; what each raised, or returned."""
    mesh = Mesh({"ulysses": size}, device=torch.device("cpu"))
    before = time.monotonic()
    first = _outcome(lambda: script(mesh, Trouble(kind, rank, place), timeout))
    first["seconds"] = time.monotonic() - before
    return {
        "first": first,
        "threads": [thread.name for thread in threading.enumerate() if "pipeboost" in thread.name],
        "second": _outcome(lambda: script(mesh, Trouble("none", 0, ""), timeout)),
    }


def _outcome(call: Any) -> dict[str, Any]:
    try:
        return {"returned": call()}
    except (PipeboostError, ValueError) as error:
        names = ("rank", "stage", "signal", "traceback")
        return {"raised": type(error).__name__, "text": str(error), **{n: getattr(error, n, None) for n in names}}
