"""`channel_norm` on a GPU: one pass over the map instead of nine."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 8192
"""Values that one program has: all channels of some pixels."""
_LEAST_PIXELS = 32
"""Where pixels lie side by side: 64 bytes in 16 bits."""


def normalise(states: torch.Tensor, gamma: torch.Tensor, scale: float, eps: float, *, activate: bool) -> torch.Tensor:
    """Return the norm of `states`, `(batch, channels, *extents)`, contiguous or with channels side by side."""
    out = torch.empty_like(states)
    batch, channels = states.shape[:2]
    pixels = states[0, 0].numel()
    planes = states.is_contiguous() and pixels > 1
    block = triton.next_power_of_2(channels)
    several = max(_TILE // block, _LEAST_PIXELS if planes else 1)
    _normalise[(batch * triton.cdiv(pixels, several),)](
        states, gamma.contiguous(), out, pixels, channels,
        pixels if planes else 1, 1 if planes else channels, scale, eps,
        CHANNELS=block, PIXELS=several, ACTIVATE=activate, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    states_pointer, gamma_pointer, out_pointer, pixels, channels, channel_stride, pixel_stride, scale, eps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pixels, PIXELS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    numbers = sample * pixels * channels + pixel[:, None] * pixel_stride + channel[None, :] * channel_stride
    values = tl.load(states_pointer + numbers, mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_pointer + channel, mask=channel < channels, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(values * values, axis=1)), eps)
    values = values / length[:, None] * (scale * gamma)[None, :]
    if ACTIVATE:
        values = values / (1.0 + tl.exp(-values))
    tl.store(out_pointer + numbers, values, mask=mask)
