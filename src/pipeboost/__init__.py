"""pipeboost: one line gives a stock Diffusers pipeline the speed of a dedicated engine.

`accelerate_pipeline(pipe)` accelerates it in place; `pipe.acceleration` shows what was done and takes it off again.
What is named here is loaded when it is first used, so that the command can answer Ctrl-C while it loads.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeboost.acceleration import Acceleration, accelerate_pipeline
    from pipeboost.core.config import (
        AccelerationConfig,
        AttentionConfig,
        CacheConfig,
        CompileConfig,
        OffloadConfig,
        ParallelConfig,
        QuantizeConfig,
        ReuseConfig,
    )
    from pipeboost.core.errors import Cancelled, ConfigurationError, PipeboostError, RankFailedError
    from pipeboost.distributed.launch import launch
    from pipeboost.generate import (
        GeneratedImage,
        GeneratedVideo,
        free_models,
        generate_image,
        generate_video,
        load_model,
    )
    from pipeboost.stages import Checks, FailedCheck, Progress, Stage, StageParallelism

__all__ = [
    "Acceleration", "AccelerationConfig", "AttentionConfig", "CacheConfig", "Cancelled", "Checks", "CompileConfig",
    "ConfigurationError", "FailedCheck", "GeneratedImage", "GeneratedVideo", "OffloadConfig", "ParallelConfig",
    "PipeboostError", "Progress", "QuantizeConfig", "RankFailedError", "ReuseConfig", "Stage", "StageParallelism",
    "accelerate_pipeline", "free_models", "generate_image", "generate_video", "launch", "load_model",
]  # fmt: skip

_HOMES = ("core.errors", "core.config", "stages", "distributed.launch", "acceleration", "generate")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
