"""pipeboost: one line gives a stock Diffusers pipeline the speed of a dedicated engine.

`accelerate_pipeline(pipe)` accelerates it in place; `pipe.acceleration` shows what was done and takes it off again.
"""

from pipeboost.acceleration import Acceleration, accelerate_pipeline
from pipeboost.config import (
    AccelerationConfig,
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    OffloadConfig,
    ParallelConfig,
    QuantizeConfig,
)
from pipeboost.errors import Cancelled, PipeboostError

__all__ = [
    "Acceleration",
    "AccelerationConfig",
    "AttentionConfig",
    "CacheConfig",
    "Cancelled",
    "CompileConfig",
    "OffloadConfig",
    "ParallelConfig",
    "PipeboostError",
    "QuantizeConfig",
    "accelerate_pipeline",
]
