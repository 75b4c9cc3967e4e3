"""What a step would take on more GPUs than there are: each of two plays a rank of more, by Ulysses.

    torchrun --nproc-per-node 2 -m benchmarks.emulated_rank --output benchmarks/results --models flux hunyuan --ranks 4

A rank of N has an N-th of tokens and heads, writes to N - 1 others and is written to by as many. Here all that goes to
the one other GPU, and comes from it, so that kernels and links have as much to do. What arrives is not what belongs
there, so that outputs are worth nothing; times leave out how N GPUs wait for the slowest, and NCCL's part in gathering
the prediction. In the same run: stock and ours on one GPU, and with `--ranks 2` ours on both, without pretending.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.parallel import MODELS, Results, accelerated, everywhere
from pipeboost.bench.full_size import build_pipeline, forward_inputs, full_size_named
from pipeboost.contract.call import current_call
from pipeboost.distributed import SEQUENCE, Group, Peers, local_device
from pipeboost.distributed.collectives import symmetric_buffers
from pipeboost.quality.timing import time_runs


def main() -> None:
    """Each model after another; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["flux", "hunyuan"], choices=tuple(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[4])
    parser.add_argument("--repeats", type=int, default=7)
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    device = local_device()
    torch.cuda.set_device(device)
    results = Results(settings.output, device, kind="emulated")
    for model in settings.models:
        size = full_size_named(MODELS[model])
        pipe = build_pipeline(size, device=device, dtype=torch.bfloat16)
        inputs = forward_inputs(size, device=device, dtype=torch.bfloat16)

        def add(variant: str, model: str = model, pipe: Any = pipe, inputs: dict[str, Any] = inputs) -> None:
            timing, _ = time_runs(lambda: pipe.transformer(**inputs)[0], device, repeats=settings.repeats, warm_ups=5)
            results.add(model=model, variant=variant, forward_ms=max(everywhere(timing.median)))

        with torch.no_grad():
            add("stock, 1 GPU")
            with accelerated(pipe, None, opened=True, graphs=True):
                add("ours, 1 GPU")
            for ranks in settings.ranks:
                with accelerated(pipe, {"ulysses": 2}, opened=True, graphs=True), _of_more(ranks):
                    add(f"ours, ulysses={ranks}{' (emulated)' if ranks > 2 else ''}")
        del pipe, inputs


@contextlib.contextmanager
def _of_more(ranks: int) -> Iterator[None]:
    """Inside, the mesh of the call is taken for one of so many, though it is of two."""
    call = current_call()
    assert call is not None
    assert call.mesh is not None
    mesh, given = call.mesh, dict(call.mesh._groups)
    if ranks > 2:
        mesh._groups[("ulysses",)] = mesh._groups[SEQUENCE] = _GroupOfMore(mesh.group("ulysses"), ranks)  # type: ignore
    try:
        yield
    finally:
        mesh._groups = given


class _GroupOfMore:
    """The first or second of so many ranks."""

    def __init__(self, group: Group, size: int) -> None:
        self.size, self.rank, self.name = size, group.rank, group.name
        self._group = group
        self._peers: Peers | None = None

    def peers(self, heads_bytes: int, tokens_bytes: int, device: torch.device) -> Peers:
        if self._peers is None:
            whole = self._group.peers(self.size * heads_bytes, self.size * tokens_bytes, device)
            assert whole is not None, self._group.unreachable
            self._peers = _PeersOfMore(
                whole, self, symmetric_buffers.rounded(heads_bytes), symmetric_buffers.rounded(tokens_bytes)
            )
        assert self.size * heads_bytes <= self._peers.heads_bytes, "one size at a time"
        return self._peers

    def all_gather(self, tensor: torch.Tensor, dim: int, sizes: Any) -> torch.Tensor:
        return torch.cat([tensor[:, : min(sizes)]] * self.size, dim)


class _PeersOfMore(Peers):
    """The memory of two ranks, in which each other one has a receive buffer of its own at the other GPU."""

    def __init__(self, whole: Peers, group: _GroupOfMore, heads_bytes: int, tokens_bytes: int) -> None:
        vars(self).update(vars(whole))
        self._whole, self._group = whole, group  # type: ignore[assignment]
        self._heads_buffers = self._spread(symmetric_buffers.SIGNAL_PAD, heads_bytes)
        self._tokens_buffers = self._spread(symmetric_buffers.SIGNAL_PAD + whole.heads_bytes, tokens_bytes)

    def _spread(self, begin: int, stride: int) -> torch.Tensor:
        memories, here = self._whole._signal_pads.tolist(), self._group.rank
        others = iter(range(self._group.size - 1))
        places = [
            memories[here] + begin if rank == here else memories[1 - here] + begin + next(others) * stride
            for rank in range(self._group.size)
        ]
        return torch.tensor(places, dtype=torch.int64, device=self._memory.device)

    def _barrier(self) -> None:
        self._whole._barrier()


if __name__ == "__main__":
    main()
