"""Quantisation of rows as a Triton kernel; `float8.py` has it as an operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


def launch_quantise_rows(
    parts: Sequence[torch.Tensor], gelu: Sequence[bool], out: torch.Tensor, scale: torch.Tensor
) -> None:
    """Write the rows and scales of `quantise_rows`; one or two parts, contiguous."""
    one, other = parts[0], parts[-1]
    width, other_width = one.shape[1], other.shape[1] if len(parts) > 1 else 0
    block = triton.next_power_of_2(width)
    other_block = triton.next_power_of_2(max(other_width, 1))
    _quantise_rows[(len(out),)](
        one, other, out, scale, width, other_width, BLOCK=block, OTHER_BLOCK=other_block, TWO=len(parts) > 1,
        GELU=gelu[0], OTHER_GELU=gelu[-1], num_warps=min(16, max(4, (block + other_block) // 1024)),
    )  # fmt: skip


@triton.jit
def float8_scale(largest):  # type: ignore[no-untyped-def]
    """The scale of a row whose largest absolute value this is."""
    return tl.maximum(largest, 1e-12) / 448.0


@triton.jit
def to_float8(x, scale):  # type: ignore[no-untyped-def]
    """Numbers in units of their scale; the conversion gives the largest for what rounds beyond it."""
    return (x * (1.0 / scale)).to(tl.float8e4nv)


@triton.jit
def _gelu(x):  # type: ignore[no-untyped-def]
    # x * sigmoid(2 y) is the tanh form: tanh(y) = 2 * sigmoid(2 y) - 1.
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _quantise_rows(  # type: ignore[no-untyped-def]
    one_pointer, other_pointer, out_pointer, scale_pointer, width, other_width,
    BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr, TWO: tl.constexpr, GELU: tl.constexpr, OTHER_GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    one = tl.load(one_pointer + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        one = _gelu(one)
    largest = tl.max(tl.abs(one), axis=0)
    if TWO:
        other_column = tl.arange(0, OTHER_BLOCK)
        other_mask = other_column < other_width
        other = tl.load(other_pointer + row * other_width + other_column, mask=other_mask, other=0.0).to(tl.float32)
        if OTHER_GELU:
            other = _gelu(other)
        largest = tl.maximum(largest, tl.max(tl.abs(other), axis=0))
    scale = float8_scale(largest)
    tl.store(scale_pointer + row, scale)
    into = out_pointer + row * (width + other_width)
    tl.store(into + column, to_float8(one, scale), mask=mask)
    if TWO:
        tl.store(into + width + other_column, to_float8(other, scale), mask=other_mask)
