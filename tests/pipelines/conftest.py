"""Graphs that many tests run on, made once."""

from collections.abc import Iterator

import pytest

from pipeboost import CompileConfig, accelerate_pipeline
from tests.pipelines.tiny import TINY

# One variant of each class of blocks.
KINDS = (
    *("flux_dev", "qwen_image", "wan21_t2v", "hunyuan_video", "hunyuan_video_15", "z_image", "ltx2"),
    *("sd3", "pixart_sigma"),
)


@pytest.fixture(scope="session")
def graphs_stay() -> Iterator[None]:
    """Graphs live as long as one pipeline that may run on them; with these they stay for the next test.

    To trace a class of blocks takes longer than all else that a test does.
    """
    traced = CompileConfig(backend="eager")
    kept = [accelerate_pipeline(TINY[name].build(), quality="lossless", compile=traced) for name in KINDS]
    yield
    kept.clear()
