"""What a process runs in `test_peers_gpu`: four ranks on one GPU, that reach each other's memory as GPUs do."""

import itertools
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from pipeboost.distributed import Peers, peers
from pipeboost.kernels import KERNELS, available_kernels
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
    # Else streams share queues, and what a rank waits for may stand behind its waiting. Read when CUDA starts.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    return [_exchanged(*case) for case in cases]


def _exchanged(batch: int, tokens: Sequence[int], heads: int, dim: int, dtype: str, parts: int) -> dict[str, Any]:
    team = _team(batch * sum(tokens) * heads * dim * 4)
    streams = [torch.cuda.Stream() for _ in range(RANKS)]
    given = [torch.empty(3, batch, own, heads, dim, device="cuda", dtype=getattr(torch, dtype)) for own in tokens]
    kernel = KERNELS["flash3" if dtype == "bfloat16" and "flash3" in available_kernels(detect_hardware()) else "sdpa"]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = kernel.function(q, k, v, None, False)  # type: ignore[assignment]
        return out

    def renew() -> None:
        for tensor, rank in zip(given, team, strict=True):
            tensor.normal_(generator=torch.Generator("cuda").manual_seed(next(_seeds)))
            rank._memory[peers._BOARD :] = 255  # NaN, which would be seen
        torch.cuda.synchronize()

    def run(attend: Attend, parts: int = parts) -> list[torch.Tensor]:
        outs = []
        for rank, numbers, stream in zip(team, given, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(rank.attended(*numbers.unbind(0), tokens, attend, parts=parts))
        torch.cuda.synchronize()
        return outs

    def captured(attend: Attend) -> tuple[list[torch.cuda.CUDAGraph], list[torch.Tensor]]:
        graphs, outs = [], []
        for rank, numbers, stream in zip(team, given, streams, strict=True):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream, capture_error_mode="thread_local"):
                outs.append(rank.attended(*numbers.unbind(0), tokens, attend, parts=parts))
        return graphs, outs

    def replay(graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()

    def are_own_queries(outs: Sequence[torch.Tensor]) -> bool:
        return all(torch.equal(out, numbers[0]) for out, numbers in zip(outs, given, strict=True))

    # Kernels are compiled and memory is taken where nobody waits, since either may wait for the GPU.
    renew()
    for rank in team:
        rank.halt()
    for each, count in ((_queries, parts), (attend, parts), (attend, 1)):
        run(each, count)
    for rank in team:
        rank._halt[0] = 0
    renew()
    moved = are_own_queries(run(_queries))
    graphs, outs = captured(_queries)
    renew()
    replay(graphs)
    moved = moved and are_own_queries(outs)
    graphs, outs = captured(attend)
    renew()
    replay(graphs)
    replayed = [out.clone() for out in outs]
    expected, _ = reference(*torch.cat(given, dim=2).unbind(0))
    error = float((torch.cat(replayed, dim=1) - expected).norm() / expected.norm())
    return {
        "moved": moved,
        "error": error,
        "replayed": all(map(torch.equal, run(attend), replayed)),
        "alike": all(map(torch.equal, run(attend, 1), replayed)),
    }


def _queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q


def _team(nbytes: int) -> list[Peers]:
    """Ranks with inboxes of so many bytes."""
    size = peers.rounded(nbytes)
    memories = [torch.zeros(peers._BOARD + 2 * size, dtype=torch.uint8, device="cuda") for _ in range(RANKS)]
    addresses = [memory.data_ptr() for memory in memories]
    groups: list[Any] = [SimpleNamespace(name=f"rank {rank} alone", rank=rank, size=RANKS) for rank in range(RANKS)]
    return [Peers(group, (size, size), memory, addresses) for group, memory in zip(groups, memories, strict=True)]
