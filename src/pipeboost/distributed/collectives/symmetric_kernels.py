"""Triton kernels that write rows straight into the memory of other GPUs, and a barrier among them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Pace(NamedTuple):
    """How a kernel sends.

    Attributes:
        block: numbers that a program has under way at a time.
        warps: of a program.
        programs: at a time; None for as many as there are blocks.
    """

    block: int
    warps: int
    programs: int | None


EXPOSED = Pace(block=2048, warps=4, programs=None)
"""For what the GPU waits for."""
HIDDEN = Pace(block=16384, warps=16, programs=24)
"""As fast as links are (420 GB/s within an H200), on few multiprocessors: attention beside it has the others."""


# Triton evaluates annotations in the kernel's scope, so its pointers and numbers have none. Programs that follow each
# other write to different ranks, this one among them last: so what goes over the links and what stays here overlap.
@triton.jit
def send_heads(  # type: ignore[no-untyped-def]
    q, k, v, recv_buffers, offset, batch, own, first, total,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, apart, here,
    RANKS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hand each rank some of its heads of this rank's tokens: `(3, batch, total, these heads, head_dim)` there.

    Args:
        offset: of what arrives, from the beginning of a receive buffer, in numbers.
        apart: from the first of one rank's heads to the next one's, in numbers.
        ROW: numbers of a token's heads that go to one rank.
    """
    blocks = (own * ROW + BLOCK - 1) // BLOCK
    for item in range(tl.program_id(0), 3 * batch * blocks * RANKS, tl.num_programs(0)):
        rank = (here + 1 + item) % RANKS
        block = item // RANKS % blocks
        part = item // RANKS // blocks
        sample = (part // 3).to(tl.int64)
        which = part % 3
        numbers = block * BLOCK + tl.arange(0, BLOCK)
        token = (numbers // ROW).to(tl.int64)
        column = rank * apart + numbers % ROW
        mask = numbers < own * ROW
        if which == 0:
            source = q + sample * q_batch + token * q_token + column
        elif which == 1:
            source = k + sample * k_batch + token * k_token + column
        else:
            source = v + sample * v_batch + token * v_token + column
        recv_buffer = tl.multiple_of(tl.load(recv_buffers + rank), 16).to(tl.pointer_type(q.dtype.element_ty))
        place = offset + ((which * batch + sample) * total + first) * ROW
        tl.store(recv_buffer + place + numbers, tl.load(source, mask=mask), mask=mask)


@triton.jit
def send_tokens(  # type: ignore[no-untyped-def]
    out, recv_buffers, starts, batch, longest, total, row, column, here,
    RANKS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hand each rank its tokens of some of this rank's heads: `(batch, its tokens, heads, head_dim)` there.

    Args:
        starts: rank `r` has the tokens from `starts[r]` to `starts[r + 1]`.
        longest: the most tokens that a rank has.
        row: numbers of a token's heads, those of all ranks.
        column: where these heads begin among them.
        ROW: numbers of a token's heads that go there.
    """
    blocks = (longest * ROW + BLOCK - 1) // BLOCK
    for item in range(tl.program_id(0), batch * blocks * RANKS, tl.num_programs(0)):
        rank = (here + 1 + item) % RANKS
        block = item // RANKS % blocks
        sample = (item // RANKS // blocks).to(tl.int64)
        start = tl.load(starts + rank)
        theirs = tl.load(starts + rank + 1) - start
        numbers = block * BLOCK + tl.arange(0, BLOCK)
        mask = numbers < theirs * ROW
        values = tl.load(out + (sample * total + start) * ROW + numbers, mask=mask)
        recv_buffer = tl.multiple_of(tl.load(recv_buffers + rank), 16).to(tl.pointer_type(out.dtype.element_ty))
        place = (sample * theirs + numbers // ROW) * row + column + numbers % ROW
        tl.store(recv_buffer + place, values, mask=mask)


@triton.jit
def barrier(signal_pads, here, round_number, stop_waiting, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Go on when all ranks have come here as often as this one, or when `stop_waiting` is set.

    What a rank's GPU has written before it came is there for the others. A rank writes how often it came on the others'
    signal pads; these numbers only grow, so that nobody waits for a pad to be wiped.
    """
    now = tl.load(round_number) + 1
    tl.store(round_number, now)
    for rank in tl.static_range(RANKS):
        pad = tl.load(signal_pads + rank).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(pad + here, now, sem="release", scope="sys")
    own = tl.load(signal_pads + here).to(tl.pointer_type(tl.int32))
    for rank in tl.static_range(RANKS):
        stopped = 0
        while (tl.atomic_add(own + rank, 0, sem="acquire", scope="sys") < now) & (stopped == 0):
            stopped = tl.load(stop_waiting, volatile=True)
