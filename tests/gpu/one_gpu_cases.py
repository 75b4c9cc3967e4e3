"""What the ranks run in `test_one_gpu`: processes that share one GPU, and reach each other's memory on it."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost.distributed.collectives import groups
from pipeboost.features.parallel import rank_share
from tests.gpu.parallel_gpu_cases import _difference, _exact_device, in_two_parts
from tests.pipelines.tiny import TINY


class ThroughHost:
    """What `Group` asks of NCCL, which refuses ranks on one GPU: gloo carries copies on the host."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._gloo = dist.ProcessGroupGloo(store, rank, size, groups.LIMIT)
        self._begun: list[tuple[Any, torch.Tensor | None, torch.Tensor]] = []

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> "ThroughHost":
        host = tensors[0].cpu()
        self._gloo.allreduce([host], options).wait()
        tensors[0].copy_(host)
        return self

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> "ThroughHost":
        host = tensors[0].cpu()
        self._gloo.broadcast([host], options).wait()
        tensors[0].copy_(host)
        return self

    def _allgather_base(self, everyone: torch.Tensor, own: torch.Tensor, options: Any) -> "ThroughHost":
        host = torch.empty(everyone.shape, dtype=everyone.dtype)
        self._gloo._allgather_base(host, own.cpu(), options).wait()
        everyone.copy_(host)
        return self

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> None:
        host = tensors[0].cpu()
        self._begun.append((self._gloo.send([host], rank, tag), None, host))

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> None:
        host = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
        self._begun.append((self._gloo.recv([host], rank, tag), tensors[0], host))

    def _start_coalescing(self) -> None:
        assert not self._begun

    def _end_coalescing(self) -> "ThroughHost":
        for work, target, host in self._begun:
            work.wait()
            if target is not None:
                target.copy_(host)
        self._begun.clear()
        return self

    def wait(self) -> None:
        """All of it is done at once."""

    def shutdown(self) -> None:
        self._gloo.shutdown()


@contextlib.contextmanager
def _sharing_one_gpu() -> Iterator[None]:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device, backend = rank_share.local_device, groups._backend
    rank_share.local_device = lambda: torch.device("cuda", 0)
    groups._backend = lambda kind, *where: (ThroughHost if kind == "cuda" else _gloo)(*where)
    try:
        yield
    finally:
        rank_share.local_device, groups._backend = device, backend


def _gloo(*where: Any) -> Any:
    return dist.ProcessGroupGloo(*where, groups.LIMIT)


def layouts(name: str, degrees: Sequence[Mapping[str, int]], parts: bool = False) -> list[dict[str, Any]]:
    """In each layout, largest differences of final latents; with `parts`, heads are exchanged in two.

    Returns:
        For each layout, `"shared"`: to one rank; `"removed"`: of stock to stock; `"carrier"`: of heads and tokens.
    """
    os.environ["LOCAL_RANK"] = "0"
    device = _exact_device()
    entry = TINY[name]
    pipe = entry.build().to(device)
    found = []
    with torch.no_grad(), _sharing_one_gpu(), in_two_parts(parts):
        stock = entry.call(pipe, output_type="latent")
        for layout in degrees:
            accelerate_pipeline(pipe, compile=None, parallel=ParallelConfig(**layout), reuse=None)
            shared, carrier = entry.call(pipe, output_type="latent"), pipe.acceleration.report().ulysses
            pipe.acceleration.remove()
            removed = _difference(entry.call(pipe, output_type="latent"), stock)
            found.append({"shared": _difference(shared, stock), "removed": removed, "carrier": carrier})
    return found
