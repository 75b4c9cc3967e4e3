"""Rotary position embedding in real arithmetic, which torch.compile fuses; it generates no code for complex numbers."""

from __future__ import annotations

import torch


def rotate_pairs(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring channels by the angle of a unit complex number.

    Args:
        x: `(batch, tokens, heads, head_dim)`.
        frequencies: complex `(tokens, head_dim / 2)`.

    Returns:
        The product, computed in float32, in the shape and dtype of `x`.
    """
    turn = torch.view_as_real(frequencies).unsqueeze(1)
    cosine, sine = turn[..., 0], turn[..., 1]
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.flatten(3).type_as(x)
