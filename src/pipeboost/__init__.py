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
    ReuseConfig,
)
from pipeboost.distributed.launch import launch
from pipeboost.errors import Cancelled, ConfigurationError, PipeboostError, RankFailedError
from pipeboost.generate import GeneratedImage, GeneratedVideo, free_models, generate_image, generate_video, load_model
from pipeboost.stages import Checks, FailedCheck, Progress, Stage, StageParallelism

__all__ = [
    "Acceleration",
    "AccelerationConfig",
    "AttentionConfig",
    "CacheConfig",
    "Cancelled",
    "Checks",
    "CompileConfig",
    "ConfigurationError",
    "FailedCheck",
    "GeneratedImage",
    "GeneratedVideo",
    "OffloadConfig",
    "ParallelConfig",
    "PipeboostError",
    "Progress",
    "QuantizeConfig",
    "RankFailedError",
    "ReuseConfig",
    "Stage",
    "StageParallelism",
    "accelerate_pipeline",
    "free_models",
    "generate_image",
    "generate_video",
    "launch",
    "load_model",
]
