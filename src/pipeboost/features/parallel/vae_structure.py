"""Whether every module of a VAE's encoder or decoder is one that ranks can share."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import Autoencoder

_PER_PIXEL = (
    *(nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout, nn.Linear, nn.GroupNorm, nn.ZeroPad2d),
    *(nn.SiLU, nn.ReLU, nn.GELU, nn.Mish, nn.Tanh),
)
_UPSAMPLING = ("nearest", "nearest-exact")


@dataclass(frozen=True)
class Structure:
    """What dividing the map of an encoder or decoder depends on.

    Attributes:
        stride: pixels of its input that are one row of the latent map.
        reach: how many pixels beyond its own its largest convolution looks.
        attention: how many of its modules attend to the whole map.
    """

    stride: int
    reach: int
    attention: int


def structure_of(part: nn.Module, autoencoder: Autoencoder | None) -> Structure | str:
    """Return the structure of an encoder or decoder, or why ranks cannot share its forwards."""
    if autoencoder is None:
        return "its family does not say what it is made of"
    convolutions = []
    for module in part.modules():
        reason = _why_not(module, autoencoder)
        if reason is not None:
            return reason
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            convolutions.append(module)
    vertical, horizontal = (math.prod(each.stride[dim] for each in convolutions) for dim in (-2, -1))
    if vertical != horizontal:
        return "it scales height and width differently"
    reach = max(each.kernel_size[dim] // 2 for each in convolutions for dim in (-2, -1))
    classes = Counter(stock_class(module).__name__ for module in part.modules())
    return Structure(vertical, reach, sum(classes[name] for name in {name for name, _ in autoencoder.attention}))


def _why_not(module: nn.Module, autoencoder: Autoencoder) -> str | None:
    cls = stock_class(module)
    name = cls.__name__
    declared = name in autoencoder.local
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        known = declared or cls in (nn.Conv2d, nn.Conv3d)
        return _why_not_convolution(module) if known else f"{name} is not known"
    if isinstance(module, nn.Upsample):
        factors = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,)
        whole = module.size is None and all(each is not None and float(each).is_integer() for each in factors)
        known = (declared or cls is nn.Upsample) and module.mode in _UPSAMPLING and whole
        return None if known else f"upsampling by {module.scale_factor}, {module.mode}"
    processors = [processor for attention, processor in autoencoder.attention if attention == name]
    if processors:
        processor = getattr(module, "processor", None)
        given = "" if processor is None else stock_class(processor).__name__
        return None if given in processors else f"its attention processor {given} is not known"
    return None if declared or cls in _PER_PIXEL else f"{name} is not known"


def _why_not_convolution(module: nn.Conv2d | nn.Conv3d) -> str | None:
    """Return why ranks cannot share a convolution; None where they can.

    With a kernel of 3 or more along a dimension it keeps the extent (stride 1) or halves it (stride 2), given an even
    one. What it does not pad itself was padded before it: by half a kernel on both sides where the stride is 1, by one
    pixel behind or by one on both sides where it is 2.
    """
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"padding {module.padding_mode!r} inside a convolution"
    for dim in (-2, -1):
        kernel, stride, padding = module.kernel_size[dim], module.stride[dim], module.padding[dim]
        known = module.dilation[dim] == 1 and (
            (kernel == 1 and stride == 1 and padding == 0)
            or (kernel % 2 == 1 and kernel > 1 and stride == 1 and padding in (0, kernel // 2))
            or (kernel == 3 and stride == 2 and padding in (0, 1))
        )
        if not known:
            return f"a convolution with kernel {kernel}, stride {stride} and padding {padding}"
    return None
