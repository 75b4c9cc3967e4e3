"""Layers on those modules of a VAE that look beyond a pixel: they make a strip's result part of the whole map's.

Each leaves its module as stock where no strip is worked on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.features.parallel.vae_strip import Strip, current_strip

Convolution = nn.Conv2d | nn.Conv3d
_PIECES = 8


def share_convolution(module: Convolution, ledger: Ledger) -> None:
    """Make a convolution see its neighbours' border pixels; see `why_not_shared` for which can."""
    # Causal convolutions of video VAEs pad in their own `forward`; this door lies behind it.
    ledger.add_middleware(module, "_conv_forward", _convolve, place="submodule.strips")


def share_group_norm(module: nn.GroupNorm, ledger: Ledger) -> None:
    """Make a group norm take its statistics from the whole map."""
    ledger.add_middleware(module, "__call__", _normalise, place="submodule.strips")


def share_attention(module: nn.Module, ledger: Ledger) -> None:
    """Make the scaled dot product attention in a module's `forward` see the keys and values of the whole map.

    Tokens are in the order (frames, rows, columns). A mask of its own depends on nothing but the frames of query and
    key.
    """
    ledger.add_middleware(module, "__call__", _attend, place="submodule.strips")


def why_not_shared(module: Convolution) -> str | None:
    """Why `share_convolution` is not for a convolution; None where it is.

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


def _convolve(
    call_next: Callable[..., torch.Tensor],
    module: Convolution,
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    strip = current_strip()
    if strip is None or module.kernel_size[strip.dim] == 1:
        return call_next(states, weight, bias)
    kernel, stride = module.kernel_size[strip.dim], module.stride[strip.dim]
    own_padding = [int(pixels) for pixels in module.padding]
    if own_padding[strip.dim]:
        before = after = own_padding[strip.dim]
        own_padding[strip.dim] = 0
        states = F.pad(states, (0, 0, before, after) if strip.dim == -2 else (before, after))
    else:
        # The extent without padding is even where the stride is 2.
        before, after = (kernel // 2, kernel // 2) if stride == 1 else (1 - states.shape[strip.dim] % 2, 1)
    # The last output begins `stride` pixels before the end of the strip, less what lies before the first.
    strip.fill_borders(states, before=before, after=after, above=before, below=kernel - stride - before)
    convolve = F.conv2d if isinstance(module, nn.Conv2d) else F.conv3d
    return convolve(states, weight, bias, module.stride, tuple(own_padding), module.dilation, module.groups)


def _normalise(call_next: Callable[..., torch.Tensor], module: nn.GroupNorm, states: torch.Tensor) -> torch.Tensor:
    strip = current_strip()
    if strip is None:
        return call_next(states)
    batch, channels = states.shape[:2]
    dtype = torch.promote_types(states.dtype, torch.float32)
    values = states.reshape(batch, module.num_groups, -1)
    # A few groups at a time, so that no copy of the whole in float32 is needed.
    pieces = values.split(values.shape[1] if states.dtype == dtype else -(-values.shape[1] // _PIECES), dim=1)
    variances_means = [torch.var_mean(piece.to(dtype), dim=-1, correction=0) for piece in pieces]
    variance, mean = (torch.cat(parts, dim=1) for parts in zip(*variances_means, strict=True))
    # Means and variances of the ranks merge without cancellation (Chan, Golub and LeVeque, 1979).
    own = torch.stack([mean, variance])[None]
    means, variances = strip.group.all_gather(own, 0, [1] * strip.group.size).double().unbind(1)
    shares = strip.shares[:, None, None]
    total_mean = (shares * means).sum(0)
    total_variance = (shares * (variances + (means - total_mean).square())).sum(0)
    # A batch norm with given statistics does the rest in one kernel, each sample's channels being channels of one.
    spread = channels // module.num_groups
    result = F.batch_norm(
        states.reshape(1, batch * channels, *states.shape[2:]),
        total_mean.to(dtype).repeat_interleave(spread),
        total_variance.to(dtype).repeat_interleave(spread),
        None if module.weight is None else module.weight.to(dtype).repeat(batch),
        None if module.bias is None else module.bias.to(dtype).repeat(batch),
        eps=module.eps,
    )
    return result.view(states.shape)


def _attend(call_next: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    strip = current_strip()
    if strip is None:
        return call_next(*args, **kwargs)
    with _AllKeys(strip) as keys:
        result = call_next(*args, **kwargs)
    if not keys.used:
        raise UnsupportedError(
            f"{stock_class(module).__name__} in the VAE attends without torch's scaled_dot_product_attention, so that "
            "ranks cannot share it; restore its attention processor or use ParallelConfig(vae=False)"
        )
    return result


class _AllKeys(TorchFunctionMode):
    """Inside, scaled dot product attention sees the keys and values of all ranks."""

    def __init__(self, strip: Strip) -> None:
        super().__init__()
        self.strip = strip
        self.used = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.used = True
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        tokens = self.strip.extents(key.shape[-2])
        if attn_mask is not None:
            attn_mask = self._mask_of_all(attn_mask, tokens)
        both = self.strip.group.all_gather(torch.cat([key, value], dim=-1), key.ndim - 2, tokens)
        key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **more)

    def _mask_of_all(self, mask: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """A mask over own keys as one over all: each frame's column, as often as a rank has pixels in a frame."""
        pixels = [rows * self.strip.breadth for rows in self.strip.rows]
        frames = [count // pixel for count, pixel in zip(tokens, pixels, strict=True)]
        of_frames = mask[..., :: pixels[self.strip.group.rank]]
        assert of_frames.shape[-1] == frames[0], "masked attention is over the latent map"
        return torch.cat([of_frames.repeat_interleave(pixel, dim=-1) for pixel in pixels], dim=-1)
