"""Convolutions of video VAEs, computed without the zeros that stock puts around their input.

A causal convolution sees the frames before its own, from a cache or else zeros. Stock writes all of its input anew to
put zeros on each side; here the convolution supplies those of rows and columns. Where nothing was before the one frame
of an image, all taps but the last see zeros, and it is a convolution in two dimensions with the weights of that tap.
The sums have the same terms, but for those that are zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeboost.core.seams import signature_of, stock_class

_HALF = (torch.bfloat16, torch.float16)


def is_causal(module: nn.Module) -> bool:
    """Whether a module is a convolution over frames that pads its own input, in time before it alone.

    It has `forward(x, cache_x=None)`, `cache_x` being the frames before, and `_padding` as `torch.nn.functional.pad`
    takes it.
    """
    if not isinstance(module, nn.Conv3d) or list(signature_of(stock_class(module), "forward").parameters)[1:] != [
        "x",
        "cache_x",
    ]:
        return False
    pads: tuple[int, ...] = tuple(getattr(module, "_padding", ()))
    return (
        len(pads) == 6
        and (pads[0], pads[2], pads[5]) == (pads[1], pads[3], 0)
        and module.padding == (0, 0, 0)
        and module.dilation == (1, 1, 1)
        and module.padding_mode == "zeros"
    )


def convolve_causally(
    module: Any, states: torch.Tensor, before: torch.Tensor | None, *, channels_last: bool
) -> torch.Tensor:
    """Compute the `forward` of a module that `is_causal`.

    Args:
        module: the convolution.
        states: `(batch, channels, frames, height, width)`.
        before: the frames before them, where there are any.
        channels_last: whether weights are used as `in_channels_last`.
    """
    _, across, _, down, missing, _ = module._padding
    if before is not None and missing > 0:
        states = torch.cat([before.to(states.device), states], dim=2)
        missing -= before.shape[2]
    weight, bias, strides = module.weight, module.bias, module.stride
    if states.shape[2] == 1 and missing == weight.shape[2] - 1:
        last = weight[:, :, -1]
        last = in_channels_last(last) if channels_last else last
        # By position, as `nn.Conv2d` calls it: ranks that share a map stand in for the function.
        out = F.conv2d(states[:, :, 0], last, bias, strides[1:], (down, across), (1, 1), module.groups)
        return out.unsqueeze(2)
    if missing:
        states = F.pad(states, (0, 0, 0, 0, missing, 0))
    weight = in_channels_last(weight) if channels_last else weight
    return F.conv3d(states, weight, bias, strides, (0, down, across), (1, 1, 1), module.groups)


def in_channels_last(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight of a convolution so that a GPU computes in 16 bits with the channels of a pixel side by side.

    It is copied at each use, which takes a thousandth of the convolution's time, so that none can be out of date.
    """
    if weight.device.type != "cuda" or weight.dtype not in _HALF:
        return weight
    return weight.contiguous(memory_format=torch.channels_last if weight.ndim == 4 else torch.channels_last_3d)
