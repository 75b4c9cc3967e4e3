"""What a process runs in `test_peers_gpu`: four ranks on one GPU, that reach each other's memory as GPUs do."""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from pipeboost.distributed import Peers
from pipeboost.distributed.collectives import symmetric_buffers
from pipeboost.distributed.failure.collective_wait import Operations
from pipeboost.kernels.table import KERNELS, available_kernels
from tests.gpu.test_attention_gpu import detect_hardware, reference

RANKS = 4
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_seeds = itertools.count()


def exchanges(cases: Sequence[tuple[int, Sequence[int], int, int, str, int]]) -> list[dict[str, Any]]:
    """For each case (batch, tokens of each rank, heads, head_dim, dtype, parts), what becomes of fresh numbers.

    Returns:
        `"moved"`: whether queries that are handed back as an output are their ranks' own again, at once and from CUDA
        graphs; `"error"`: of attention, relative to float64; `"replayed"`, `"alike"`: whether from graphs, and in one
        part, it is the same to the bit.
    """
    _give_streams_queues()
    return [_exchanged(_FourRanks(*case)) for case in cases]


def after_errors() -> dict[str, list[bool]]:
    """Whether an exchange is right after one in which attention to its first or second part failed on all ranks alike.

    Returns:
        For exchanges that ran at once, and for those that were captured.
    """
    _give_streams_queues()
    ranks = _FourRanks(1, [40] * RANKS, 8, 64, "bfloat16", 2)
    return {name: _after_errors(ranks, captured=name == "captured") for name in ("at once", "captured")}


def _after_errors(ranks: "_FourRanks", *, captured: bool) -> list[bool]:
    found = []
    for part in range(2):
        for number, stream in enumerate(ranks.streams):
            capture = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local")
            with contextlib.suppress(ZeroDivisionError), capture if captured else torch.cuda.stream(stream):
                ranks.attended(number, _failing_at(part))
        torch.cuda.synchronize()
        for parts in (1, 2):
            ranks.renew()
            found.append(ranks.have_own_queries(ranks.run(_queries, parts)))
    return found


class _FourRanks:
    """Four ranks and the numbers that each has of its own; none waits for the others before they are all ready."""

    def __init__(self, batch: int, tokens: Sequence[int], heads: int, dim: int, dtype: str, parts: int) -> None:
        self.tokens, self.parts = tokens, parts
        self.team = _team(batch * sum(tokens) * heads * dim * 4)
        self.streams = [torch.cuda.Stream() for _ in range(RANKS)]
        shapes = [(3, batch, own, heads, dim) for own in tokens]
        self.given = [torch.empty(shape, device="cuda", dtype=getattr(torch, dtype)) for shape in shapes]
        flash = dtype == "bfloat16" and "flash3" in available_kernels(detect_hardware())
        self._kernel = KERNELS["flash3" if flash else "sdpa"].function
        # Kernels are compiled and memory is taken where nobody waits, since either may wait for the GPU.
        self.renew()
        for rank in self.team:
            rank.stop_waiting()
        for attend, count in itertools.product((_queries, self.attend), (1, parts)):
            self.run(attend, count)
        for rank in self.team:
            rank._stop_waiting[0] = 0

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = self._kernel(q, k, v, None, False)
        assert isinstance(out, torch.Tensor)
        return out

    def attended(self, number: int, attend: Attend, parts: int | None = None) -> torch.Tensor:
        """What the rank of this number does, on the current stream."""
        qkv = self.given[number].unbind(0)
        return self.team[number].attended(*qkv, tokens=self.tokens, attend=attend, parts=parts or self.parts)

    def renew(self) -> None:
        """Other numbers, and receive buffers in which what is not written would be seen."""
        for tensor, rank in zip(self.given, self.team, strict=True):
            tensor.normal_(generator=torch.Generator("cuda").manual_seed(next(_seeds)))
            rank._memory[symmetric_buffers.SIGNAL_PAD :] = 255  # NaN
        torch.cuda.synchronize()

    def run(self, attend: Attend, parts: int | None = None) -> list[torch.Tensor]:
        """What each rank gets."""
        outs = []
        for number, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                outs.append(self.attended(number, attend, parts))
        torch.cuda.synchronize()
        return outs

    def captured(self, attend: Attend) -> tuple[list[torch.cuda.CUDAGraph], list[torch.Tensor]]:
        """Graphs of it, and where these will write."""
        graphs, outs = [], []
        for number, stream in enumerate(self.streams):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream, capture_error_mode="thread_local"):
                outs.append(self.attended(number, attend))
        return graphs, outs

    def replay(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        """All at once."""
        for graph, stream in zip(graphs, self.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()

    def have_own_queries(self, outs: Sequence[torch.Tensor]) -> bool:
        """Whether the queries are back where they came from."""
        return all(torch.equal(out, numbers[0]) for out, numbers in zip(outs, self.given, strict=True))


def _exchanged(ranks: _FourRanks) -> dict[str, Any]:
    ranks.renew()
    moved = ranks.have_own_queries(ranks.run(_queries))
    graphs, outs = ranks.captured(_queries)
    ranks.renew()
    ranks.replay(graphs)
    moved = moved and ranks.have_own_queries(outs)
    graphs, outs = ranks.captured(ranks.attend)
    ranks.renew()
    ranks.replay(graphs)
    replayed = [out.clone() for out in outs]
    expected, _ = reference(*torch.cat(ranks.given, dim=2).unbind(0))
    return {
        "moved": moved,
        "error": float((torch.cat(replayed, dim=1) - expected).norm() / expected.norm()),
        "replayed": all(map(torch.equal, ranks.run(ranks.attend), replayed)),
        "alike": all(map(torch.equal, ranks.run(ranks.attend, 1), replayed)),
    }


def _queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q


def _failing_at(part: int) -> Attend:
    """Attention that fails at each rank's part of this number."""
    calls = itertools.count()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if next(calls) == part:
            raise ZeroDivisionError
        return q

    return attend


def _give_streams_queues() -> None:
    """Else streams share queues, and what a rank waits for may stand behind its waiting. Read when CUDA starts."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"


def _team(nbytes: int) -> list[Peers]:
    """Ranks with receive buffers of so many bytes."""
    size = symmetric_buffers.rounded(nbytes)
    memories = [
        torch.zeros(symmetric_buffers.SIGNAL_PAD + 2 * size, dtype=torch.uint8, device="cuda") for _ in range(RANKS)
    ]
    addresses = [memory.data_ptr() for memory in memories]
    groups: list[Any] = [
        SimpleNamespace(
            name=f"rank {rank} alone",
            rank=rank,
            size=RANKS,
            ranks=range(RANKS),
            device="cuda",
            operations=Operations(),
        )
        for rank in range(RANKS)
    ]
    return [Peers(group, (size, size), memory, addresses) for group, memory in zip(groups, memories, strict=True)]
