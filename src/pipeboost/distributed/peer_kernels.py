"""Triton kernels that write rows straight into the memory of other GPUs, and the one in which they meet."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 2
"""Rows that a program copies."""
WARPS = 4


# Triton evaluates annotations in the kernel's scope, so its pointers and numbers have none. Programs that follow each
# other write to different ranks, this one among them last: so what goes over the links and what stays here overlap.
@triton.jit
def send_heads(  # type: ignore[no-untyped-def]
    q, k, v, inboxes, own, first, total, q_batch, q_token, k_batch, k_token, v_batch, v_token, here,
    RANKS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Hand each rank its heads of this rank's tokens: `(3, batch, total, heads of a rank, head_dim)` there.

    A row is a token's heads of one rank, `ROW` numbers. Programs are (blocks of rows x ranks) x (q, k, v of a sample).
    """
    rank = (here + 1 + tl.program_id(0)) % RANKS
    which = tl.program_id(1) % 3
    sample = tl.program_id(1) // 3
    batch = tl.num_programs(1) // 3
    tokens = tl.program_id(0) // RANKS * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (tokens < own)[:, None] & (columns < ROW)[None, :]
    if which == 0:
        source = q + sample.to(tl.int64) * q_batch + tokens.to(tl.int64)[:, None] * q_token
    elif which == 1:
        source = k + sample.to(tl.int64) * k_batch + tokens.to(tl.int64)[:, None] * k_token
    else:
        source = v + sample.to(tl.int64) * v_batch + tokens.to(tl.int64)[:, None] * v_token
    rows = tl.load(source + rank * ROW + columns[None, :], mask=mask)
    inbox = tl.multiple_of(tl.load(inboxes + rank), 16).to(tl.pointer_type(q.dtype.element_ty))
    place = ((which * batch + sample).to(tl.int64) * total + first + tokens) * ROW
    tl.store(inbox + place[:, None] + columns[None, :], rows, mask=mask)


@triton.jit
def send_tokens(  # type: ignore[no-untyped-def]
    out, inboxes, starts, total, here,
    RANKS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Hand each rank its tokens of this rank's heads: `(batch, its tokens, heads, head_dim)` there.

    Programs are (blocks of rows x ranks) x samples; rank `r` has the tokens from `starts[r]` to `starts[r + 1]`.
    """
    rank = (here + 1 + tl.program_id(0)) % RANKS
    sample = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + rank)
    theirs = tl.load(starts + rank + 1) - start
    tokens = tl.program_id(0) // RANKS * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (tokens < theirs)[:, None] & (columns < ROW)[None, :]
    rows = tl.load(out + (sample * total + start + tokens)[:, None] * ROW + columns[None, :], mask=mask)
    inbox = tl.multiple_of(tl.load(inboxes + rank), 16).to(tl.pointer_type(out.dtype.element_ty))
    place = ((sample * theirs + tokens) * RANKS + here) * ROW
    tl.store(inbox + place[:, None] + columns[None, :], rows, mask=mask)


@triton.jit
def meet(boards, here, round_number, halt, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Go on when all ranks have come here as often as this one, or when `halt` is set.

    What a rank's GPU has written before it came is there for the others. A rank writes how often it came on the others'
    boards; these numbers only grow, so that nobody waits for a board to be wiped.
    """
    now = tl.load(round_number) + 1
    tl.store(round_number, now)
    for rank in tl.static_range(RANKS):
        board = tl.load(boards + rank).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(board + here, now, sem="release", scope="sys")
    own = tl.load(boards + here).to(tl.pointer_type(tl.int32))
    for rank in tl.static_range(RANKS):
        halted = 0
        while (tl.atomic_add(own + rank, 0, sem="acquire", scope="sys") < now) & (halted == 0):
            halted = tl.load(halt, volatile=True)
