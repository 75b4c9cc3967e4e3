"""`Peers`: memory that the GPUs of a group on one machine write into directly, over NVLink or PCIe.

NCCL's exchange of heads for tokens takes a copy that packs, the transfer, and one that unpacks; here a kernel writes
each row where it belongs, on whichever GPU that is. Needs torch's symmetric memory, and Triton.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipeboost.distributed.failure.collective_wait import finish

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group


class Stream:
    """A CUDA stream.

    Args:
        stream: None for whatever this thread's work goes to, which is all that there is on a CPU.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    @classmethod
    def current(cls, device: torch.device) -> Stream:
        """Return the one that this thread's work goes to."""
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    @classmethod
    def new(cls, device: torch.device, *, first: bool = False) -> Stream:
        """Return another one.

        Args:
            first: its kernels get the multiprocessors that become free before those of other streams.
        """
        return cls(torch.cuda.Stream(device, priority=-1 if first else 0) if device.type == "cuda" else None)

    def on(self) -> contextlib.AbstractContextManager[object]:
        """Inside, this thread's work goes to it."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """Return what stands for all the work that it was given so far."""
        return None if self._stream is None else self._stream.record_event()

    def after(self, mark: torch.cuda.Event | None) -> None:
        """Let what comes next wait for what was marked."""
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)


SIGNAL_PAD = 256
"""Bytes in front, where ranks write how often they came."""
_LEAST = 2**20
"""Bytes of a receive buffer: enough to try it."""


class _Part(NamedTuple):
    """Some of a rank's heads.

    Attributes:
        first: the first of them.
        heads: how many they are.
        last: whether no others follow.
    """

    first: int
    heads: int
    last: bool


def _parts(heads: int, count: int) -> list[_Part]:
    """So many heads in so many parts, as equal as can be, the first of two the larger."""
    begins = [heads * part // count for part in range(count + 1)]
    return [_Part(heads - end, end - begin, begin == 0) for begin, end in itertools.pairwise(begins)][::-1]


class Peers:
    """What the ranks of a group have for each other: a signal pad, and two receive buffers.

    All ranks make it at the same point of their programs, and then the same calls in the same order, each after what
    came before it on its GPU. Two buffers, so that a rank's output never arrives where another still reads what came
    before it.

    Args:
        group: of GPUs of one machine.
        sizes: bytes of the two receive buffers.
        memory: of this rank, zeros: a signal pad and the two receive buffers, one after another.
        addresses: where the memory of each rank is, as this one's GPU sees it.
        multiprocessors: of the smallest of the GPUs.

    Attributes:
        multiprocessors: as given.
        heads_bytes, tokens_bytes: the most that may arrive here of other ranks' tokens, and of this one's.
        starts: tokens of each rank → where they begin, on the GPU.
        launched: sizes of attentions that were rehearsed for a CUDA graph, on all ranks alike.
    """

    def __init__(
        self, group: Group, sizes: tuple[int, int], memory: Tensor, addresses: Sequence[int], multiprocessors: int = 1
    ) -> None:
        self.heads_bytes, self.tokens_bytes = sizes
        self.multiprocessors = multiprocessors
        self._group = group
        self._memory, device = memory, memory.device
        self._signal_pads = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._heads_buffers = self._signal_pads + SIGNAL_PAD
        self._tokens_buffers = self._heads_buffers + self.heads_bytes
        self._streams = Stream.new(device, first=True), Stream.new(device)
        self._stop_waiting = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._round = torch.zeros(1, dtype=torch.int32, device=device)
        self.starts: dict[tuple[int, ...], Tensor] = {}
        self.launched: set[tuple[int, ...]] = set()

    def attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: Sequence[int],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        parts: int = 1,
    ) -> Tensor:
        """Attention by heads: each rank has all tokens of its heads for as long as it attends to them.

        In several parts one is attended to while the next is under way.

        Args:
            q, k, v: of this rank's tokens, `(batch, own tokens, heads, head_dim)`.
            tokens: how many each rank has.
            attend: gets q, k and v as `(batch, all tokens, some of this rank's heads, head_dim)`, which are theirs only
                until it returns, and gives the same of its output.
            parts: in how many a rank's heads are dealt with; at most as many as there are heads.

        Returns:
            `(batch, own tokens, heads, head_dim)`.
        """
        group, (heads, head_dim) = self._group, q.shape[2:]
        q, k, v = (each if each.stride()[2:] == (head_dim, 1) else each.contiguous() for each in (q, k, v))
        self._starts_of(tuple(tokens))  # which waits for the GPU where they are new: not once it waits for others
        here, links, beside = (Stream.current(q.device), *self._streams) if parts > 1 else (Stream(None),) * 3
        streams = [here, beside]
        for stream in (links, beside):
            stream.after(here.mark())
        outs = []
        try:
            arrived = []
            with links.on():
                for part in _parts(heads // group.size, parts):
                    self._send_heads((q, k, v), tokens, part)
                    self._barrier()
                    arrived.append((part, links.mark()))
                finish(group, "exchange of heads for tokens")
            for number, (part, mark) in enumerate(arrived):
                # Two parts at a time: where the last blocks of one leave multiprocessors free, those of the next begin.
                stream = streams[number % 2]
                stream.after(mark)
                with stream.on():
                    outs.append(attend(*self._heads(q, sum(tokens), part)).contiguous())
                links.after(stream.mark())
                with links.on():
                    self._send_tokens(outs[-1], tokens, heads, part)
            with links.on():
                self._barrier()
                finish(group, "exchange of tokens for heads")
        finally:  # whoever goes on after an error goes on after all streams, and a capture ends with all of them
            for stream in (links, beside):
                here.after(stream.mark())
        begin = SIGNAL_PAD + self.heads_bytes
        return self._memory[begin : begin + q.nbytes].view(q.dtype).view(q.shape).clone()

    def stop_waiting(self) -> None:
        """Let this rank's GPU wait for nobody any more; what it computes from then on is worth nothing."""
        self._stop_waiting[0] = 1

    def _send_heads(self, qkv: Sequence[Tensor], tokens: Sequence[int], part: _Part) -> None:
        from pipeboost.distributed.collectives.symmetric_kernels import EXPOSED, HIDDEN, send_heads

        pace = HIDDEN if part.first else EXPOSED
        group, (batch, own, heads, head_dim) = self._group, qkv[0].shape
        total, row, apart = sum(tokens), part.heads * head_dim, heads // group.size * head_dim
        begun = part.first * head_dim
        strides = [stride for each in qkv for stride in each.stride()[:2]]
        items = 3 * batch * -(-own * row // pace.block) * group.size
        send_heads[min(items, pace.programs or items),](
            *(each[:, :, part.first :] for each in qkv), self._heads_buffers, 3 * batch * total * begun,
            batch, own, sum(tokens[: group.rank]), total, *strides, apart, group.rank,
            RANKS=group.size, ROW=row, BLOCK=pace.block, num_warps=pace.warps,
        )  # fmt: skip

    def _heads(self, like: Tensor, total: int, part: _Part) -> tuple[Tensor, ...]:
        """What has arrived of q, k and v."""
        batch, _, _, head_dim = like.shape
        begin, nbytes = (
            3 * batch * total * heads * head_dim * like.element_size() for heads in (part.first, part.heads)
        )
        received = self._memory[SIGNAL_PAD + begin : SIGNAL_PAD + begin + nbytes].view(like.dtype)
        return received.view(3, batch, total, part.heads, head_dim).unbind(0)

    def _send_tokens(self, out: Tensor, tokens: Sequence[int], heads: int, part: _Part) -> None:
        from pipeboost.distributed.collectives.symmetric_kernels import EXPOSED, HIDDEN, send_tokens

        pace = EXPOSED if part.last else HIDDEN
        group, (batch, total, _, head_dim) = self._group, out.shape
        column = (group.rank * (heads // group.size) + part.first) * head_dim
        items = batch * -(-max(tokens) * part.heads * head_dim // pace.block) * group.size
        send_tokens[min(items, pace.programs or items),](
            out, self._tokens_buffers, self._starts_of(tuple(tokens)), batch, max(tokens), total,
            heads * head_dim, column, group.rank,
            RANKS=group.size, ROW=part.heads * head_dim, BLOCK=pace.block, num_warps=pace.warps,
        )  # fmt: skip

    def _barrier(self) -> None:
        """Have this rank's GPU wait until the others' have come here too; what they wrote before is there then."""
        from pipeboost.distributed.collectives.symmetric_kernels import barrier

        barrier[(1,)](
            self._signal_pads, self._group.rank, self._round, self._stop_waiting, RANKS=self._group.size, num_warps=1
        )

    def _starts_of(self, tokens: tuple[int, ...]) -> Tensor:
        if tokens not in self.starts:
            starts = [sum(tokens[:rank]) for rank in range(len(tokens) + 1)]
            self.starts[tokens] = torch.tensor(starts, dtype=torch.int32, device=self._signal_pads.device)
        return self.starts[tokens]


def rounded(nbytes: int) -> int:
    """Return the size of a receive buffer for so many bytes."""
    return max(-(-nbytes // SIGNAL_PAD) * SIGNAL_PAD, _LEAST)
