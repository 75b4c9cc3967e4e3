"""`merge_partial` on a GPU: one pass over both outputs instead of nine."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 16


def merge_in_place(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge `part` into `out`, and `part_lse` into `lse`; shapes as of `merge_partial`, all contiguous."""
    _, tokens, heads, head_dim = out.shape
    rows = out.numel() // head_dim
    block = triton.next_power_of_2(head_dim)
    _merge[(triton.cdiv(rows, _ROWS),)](
        out, lse, part, part_lse, rows, tokens, heads, head_dim, BLOCK=block, ROWS=_ROWS
    )


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out_pointer, lse_pointer, part_pointer, part_lse_pointer, rows, tokens, heads, head_dim,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A row is one token's head.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    exists = row < rows
    token, head = row // heads, row % heads
    place = (token // tokens * heads + head) * tokens + token % tokens
    lse = tl.load(lse_pointer + place, mask=exists, other=float("-inf"))
    part_lse = tl.load(part_lse_pointer + place, mask=exists, other=float("-inf"))
    larger = tl.maximum(lse, part_lse)
    larger = tl.where(larger == float("-inf"), 0.0, larger)
    scale, part_scale = tl.exp(lse - larger), tl.exp(part_lse - larger)
    total = scale + part_scale
    some = tl.where(total > 0, total, 1.0)
    weight, part_weight = (scale / some)[:, None], (part_scale / some)[:, None]
    mask = exists[:, None] & (column < head_dim)[None, :]
    numbers = row[:, None] * head_dim + column[None, :]
    out = tl.load(out_pointer + numbers, mask=mask, other=0.0)
    part = tl.load(part_pointer + numbers, mask=mask, other=0.0).to(tl.float32)
    merged = tl.where(weight > 0, out * weight, 0.0) + tl.where(part_weight > 0, part * part_weight, 0.0)
    tl.store(out_pointer + numbers, merged, mask=mask)
    tl.store(lse_pointer + place, tl.where(total > 0, larger + tl.log(some), float("-inf")), mask=exists)
