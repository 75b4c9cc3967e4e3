"""Operators over the kernels of `norms_triton.py`, which compiled graphs call: CUDA tensors in 16 bits."""

from __future__ import annotations

import torch


@torch.library.custom_op("pipeboost::norm_rotary", mutates_args=())
def norm_rotary(
    parts: list[torch.Tensor],
    weights: list[torch.Tensor | None],
    cosines: list[torch.Tensor | None],
    sines: list[torch.Tensor | None],
    eps: list[float],
    across_heads: bool,
) -> torch.Tensor:
    """RMS-normalise and rotate the heads of parts of a sequence, and return them as one.

    Args:
        parts: each `(batch, tokens, heads, head_dim)`.
        weights: of each part's norm, `(head_dim,)`, or `(heads * head_dim,)` across heads; None for none.
        cosines: of each part, its tokens by `head_dim`, or by `head_dim / 2` where both numbers of a pair have the
            same, with dimensions of size 1 anywhere; None for a part that is not rotated.
        sines: as `cosines`.
        eps: of each part's norm.
        across_heads: whether norms are over all heads of a token together.

    Returns:
        `(batch, all tokens, heads, head_dim)`, contiguous.
    """
    from pipeboost.kernels.norms_triton import heads_are_side_by_side, launch_norm_rotary

    tokens = [part.shape[1] for part in parts]
    out = parts[0].new_empty((parts[0].shape[0], sum(tokens), *parts[0].shape[2:]))
    slices = out.split(tokens, dim=1)
    for part, weight, cos, sin, each, into in zip(parts, weights, cosines, sines, eps, slices, strict=True):
        if part.numel() == 0:  # as the text where another rank has all of it
            continue
        part = part if heads_are_side_by_side(part) else part.contiguous()
        weight = None if weight is None else weight.contiguous()
        tables = [None if table is None else _pairs(table, part.shape[1], part.shape[3]) for table in (cos, sin)]
        with torch.cuda.device_of(part):  # Triton launches on the current device, wherever the tensors are
            launch_norm_rotary(part, weight, tables[0], tables[1], into, each, across_heads)
    return out


@norm_rotary.register_fake
def _(parts, weights, cosines, sines, eps, across_heads):  # type: ignore[no-untyped-def]
    batch, _, heads, dim = parts[0].shape
    return parts[0].new_empty((batch, sum(part.shape[1] for part in parts), heads, dim))


def _pairs(table: torch.Tensor, tokens: int, dim: int) -> torch.Tensor:
    """A view `(tokens, dim / 2, 2)` of a table of cosines or sines."""
    table = table.squeeze().reshape(tokens, -1)
    return table.unflatten(1, (dim // 2, 2)) if table.shape[1] == dim else table.unsqueeze(-1).expand(-1, -1, 2)


@torch.library.custom_op("pipeboost::modulated_norm", mutates_args=())
def modulated_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    one_plus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + gate * branch`, and its layer norm times `1 + scale` plus `shift`.

    Args:
        x: `(batch, tokens, features)`.
        branch: as `x`; None: there is no sum, and an empty tensor is returned for it.
        gate: one number a feature, for all samples or for each: `(batch, 1, features)` or less; None: 1.
        scale: as `gate`; without `one_plus` it is not added to 1: the weight of an affine norm.
        shift: as `gate`.
        eps: of the norm.
    """
    from pipeboost.kernels.norms_triton import normalise

    with torch.cuda.device_of(x):
        return normalise(x, branch, gate, scale, shift, eps, one_plus)  # type: ignore[return-value]


@modulated_norm.register_fake
def _(x, branch, gate, scale, shift, eps, one_plus):  # type: ignore[no-untyped-def]
    return x.new_empty(0) if branch is None else torch.empty_like(x).contiguous(), torch.empty_like(x).contiguous()
