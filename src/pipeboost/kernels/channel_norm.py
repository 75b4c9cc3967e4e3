"""RMS norm over the channels of a map, with or without SiLU after it, as VAEs of videos have it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pipeboost.kernels.merge import has_triton

EPS = 1e-12
"""Of `torch.nn.functional.normalize`."""


def channel_norm(states: torch.Tensor, gamma: torch.Tensor, scale: float, *, activate: bool) -> torch.Tensor:
    """Divide each pixel by the length of its channels and multiply it by `scale * gamma`; with SiLU where it activates.

    On a GPU the map is read and written once, and rounded once.

    Args:
        states: `(batch, channels, *extents)`; the result has its layout.
        gamma: `(channels, 1, …)`.
    """
    if _has_kernel(states, gamma):
        from pipeboost.kernels.channel_norm_triton import normalise

        with torch.cuda.device_of(states):  # Triton launches on the current device, wherever the tensors are
            return normalise(states, gamma.reshape(-1), scale, EPS, activate=activate)
    dtype = torch.promote_types(states.dtype, torch.float32)
    normed = F.normalize(states.to(dtype), dim=1, eps=EPS).to(states.dtype) * scale * gamma
    return F.silu(normed) if activate else normed


def _has_kernel(states: torch.Tensor, gamma: torch.Tensor) -> bool:
    return (
        states.device.type == "cuda"
        and gamma.device == states.device
        and states.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and (states.is_contiguous() or is_channels_last(states))
        and not torch.is_grad_enabled()
        and has_triton()
    )


def is_channels_last(states: torch.Tensor) -> bool:
    """Whether the channels of each pixel lie side by side, and there is nothing between pixels."""
    order = (0, *range(2, states.ndim), 1)
    return states.permute(order).is_contiguous()
