"""Whether every module of a VAE's encoder or decoder is one that ranks can share."""

from __future__ import annotations

import math

from torch import nn

from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import Autoencoder
from pipeboost.features.parallel.vae_layers import why_not_shared

_PER_PIXEL = (
    nn.Sequential,
    nn.ModuleList,
    nn.Identity,
    nn.Dropout,
    nn.Linear,
    nn.GroupNorm,
    nn.ZeroPad2d,
    nn.SiLU,
    nn.ReLU,
    nn.GELU,
    nn.Mish,
    nn.Tanh,
)
_UPSAMPLING = ("nearest", "nearest-exact")


def why_not_parallel(part: nn.Module | None, autoencoder: Autoencoder | None) -> str | None:
    """Why ranks cannot share the forwards of an encoder or decoder; None where they can."""
    if part is None:
        return "there is none"
    if autoencoder is None:
        return "its family does not say what it is made of"
    strides = [1, 1]
    for module in part.modules():
        reason = _why_not(module, autoencoder)
        if reason is not None:
            return reason
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            strides = [math.prod(pair) for pair in zip(strides, module.stride[-2:], strict=True)]
    return None if strides[0] == strides[1] else "it scales height and width differently"


def _why_not(module: nn.Module, autoencoder: Autoencoder) -> str | None:
    cls = stock_class(module)
    declared = autoencoder.is_local(cls.__name__)
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        known = declared or cls in (nn.Conv2d, nn.Conv3d)
        return why_not_shared(module) if known else f"{cls.__name__} is not known"
    if isinstance(module, nn.Upsample):
        whole = module.size is None and _is_whole(module.scale_factor)
        known = (declared or cls is nn.Upsample) and module.mode in _UPSAMPLING and whole
        return None if known else f"upsampling by {module.scale_factor}, {module.mode}"
    if autoencoder.attends(cls.__name__):
        processor = getattr(module, "processor", None)
        name = "" if processor is None else stock_class(processor).__name__
        return None if (cls.__name__, name) in autoencoder.attention else f"its attention processor {name} is not known"
    return None if declared or cls in _PER_PIXEL else f"{cls.__name__} is not known"


def _is_whole(scale: object) -> bool:
    factors = scale if isinstance(scale, tuple) else (scale,)
    return all(isinstance(factor, (int, float)) and float(factor).is_integer() for factor in factors)
