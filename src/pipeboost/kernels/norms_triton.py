"""Norms of a transformer's block in one pass over memory each, as Triton kernels; `norms.py` has them as operators."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeboost.kernels.float8_triton import float8_scale, to_float8


def launch_norm_rotary(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None,
    out: torch.Tensor, eps: float, across_heads: bool,
) -> None:  # fmt: skip
    """Write RMS-normalised, weighted and rotated heads.

    Args:
        x: `(batch, tokens, heads, head_dim)`, the last two contiguous; head_dim a power of two.
        weight: `(head_dim,)`, or `(heads * head_dim,)` where the norm is across heads; contiguous.
        cos: `(tokens, head_dim / 2, 2)` with any strides: for the even and the odd number of each pair.
        sin: as `cos`.
        out: as `x`.
    """
    batch, tokens, heads, dim = x.shape
    assert heads_are_side_by_side(x)
    assert heads_are_side_by_side(out)
    nothing = (x, 0, 0, 0)
    cosines = nothing if cos is None else (cos, *cos.stride())
    sines = nothing if sin is None else (sin, *sin.stride())
    _norm_rotary[(tokens, batch)](
        x, x.stride(0), x.stride(1), out, out.stride(0), out.stride(1), x if weight is None else weight,
        *cosines, *sines, heads, eps,
        HEADS=triton.next_power_of_2(heads), DIM=dim, WEIGHTED=weight is not None, ROTATED=cos is not None,
        ACROSS=across_heads, num_warps=4,
    )  # fmt: skip


def heads_are_side_by_side(x: torch.Tensor) -> bool:
    """Whether the heads of a token lie without gaps; of one alone it is not asked how far the next would be."""
    return x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])


@triton.jit
def _norm_rotary(  # type: ignore[no-untyped-def]
    x_pointer, x_batch, x_token, out_pointer, out_batch, out_token, weight_pointer,
    cos_pointer, cos_token, cos_pair, cos_of_pair, sin_pointer, sin_token, sin_pair, sin_of_pair, heads, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, WEIGHTED: tl.constexpr, ROTATED: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, HEADS), tl.arange(0, DIM)
    places = head[:, None] * DIM + column[None, :]
    mask = (head < heads)[:, None] & (column < DIM)[None, :]
    x = tl.load(x_pointer + batch * x_batch + token * x_token + places, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=1)
    if ACROSS:
        x = x * tl.rsqrt(tl.sum(squares, axis=0) / (heads * DIM) + eps)
    else:
        x = x * tl.rsqrt(squares / DIM + eps)[:, None]
    if WEIGHTED:
        if ACROSS:
            x = x * tl.load(weight_pointer + places, mask=mask, other=0.0).to(tl.float32)
        else:
            x = x * tl.load(weight_pointer + column).to(tl.float32)[None, :]
    if ROTATED:
        pair, of_pair = tl.arange(0, DIM // 2)[:, None], tl.arange(0, 2)[None, :]
        cos = tl.load(cos_pointer + token * cos_token + pair * cos_pair + of_pair * cos_of_pair).to(tl.float32)
        sin = tl.load(sin_pointer + token * sin_token + pair * sin_pair + of_pair * sin_of_pair).to(tl.float32)
        even_cos, odd_cos = tl.split(cos)
        even_sin, odd_sin = tl.split(sin)
        even, odd = tl.split(tl.reshape(x, (HEADS, DIM // 2, 2)))
        rotated = tl.join(
            even * even_cos[None, :] - odd * even_sin[None, :], odd * odd_cos[None, :] + even * odd_sin[None, :]
        )
        x = tl.reshape(rotated, (HEADS, DIM))
    tl.store(out_pointer + batch * out_batch + token * out_token + places, x, mask=mask)


def normalise(
    x: torch.Tensor, branch: torch.Tensor | None, gate: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor,
    eps: float, one_plus: bool, *, float8: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Return the sum and the norm of `norms.modulated_norm`; with `float8` that of `float8.modulated_norm_float8`."""
    batch, tokens, width = x.shape
    x = x.contiguous()
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    out = x.new_empty((batch * tokens, width), dtype=torch.float8_e4m3fn) if float8 else torch.empty_like(x)
    scales = x.new_empty((batch * tokens, 1) if float8 else 0, dtype=torch.float32)
    tables = [x if each is None else _side_by_side(each.reshape(-1, width)) for each in (gate, scale, shift)]
    places = [argument for each in tables for argument in (each, _step(each))]
    _modulated_norm[(batch * tokens,)](
        x, x if branch is None else branch.contiguous(), *places, total, out, scales,
        tokens, width, eps, BLOCK=triton.next_power_of_2(width), BRANCH=branch is not None, GATED=gate is not None,
        ONE=1.0 if one_plus else 0.0, FLOAT8=float8, num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip
    return (total, out, scales) if float8 else (total, out)


def _side_by_side(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _step(tensor: torch.Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


@triton.jit
def _modulated_norm(  # type: ignore[no-untyped-def]
    x_pointer, branch_pointer, gate_pointer, gate_batch, scale_pointer, scale_batch, shift_pointer, shift_batch,
    total_pointer, out_pointer, scales_pointer, tokens, width, eps,
    BLOCK: tl.constexpr, BRANCH: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    column = tl.arange(0, BLOCK)
    mask = column < width
    places = row * width + column
    stored = tl.load(x_pointer + places, mask=mask, other=0.0)
    x = stored.to(tl.float32)
    scale = tl.load(scale_pointer + batch * scale_batch + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_pointer + batch * shift_batch + column, mask=mask, other=0.0).to(tl.float32)
    if BRANCH:
        branch = tl.load(branch_pointer + places, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            branch = branch * tl.load(gate_pointer + batch * gate_batch + column, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + branch).to(stored.dtype)
        tl.store(total_pointer + places, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    out = centred * tl.rsqrt(variance + eps) * (ONE + scale) + shift
    if FLOAT8:
        out_scale = float8_scale(tl.max(tl.where(mask, tl.abs(out), 0.0), axis=0))
        tl.store(scales_pointer + row, out_scale)
        out = to_float8(out, out_scale)
    tl.store(out_pointer + places, out, mask=mask)
