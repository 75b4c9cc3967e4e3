"""What the ranks run in `test_peers`: Triton's interpreter on memory that they share, in the place of GPUs."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from pipeboost.distributed import Mesh, Peers, peers


def exchanges(folder: str, cases: Sequence[tuple[int, Sequence[int], int, int, str]]) -> list[bool]:
    """For each case (batch, tokens of each rank, heads, head_dim, dtype) whether both exchanges bring what belongs.

    The inboxes are poisoned before each; what each rank has is known to all, so that all can be compared.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    mesh = Mesh({"ulysses": len(cases[0][1])}, device=torch.device("cpu"))
    group = mesh.group("ulysses")

    def shared_memory(nbytes: int, _device: Any, _group: Any, name: str) -> tuple[torch.Tensor, list[int]]:
        mapped = [
            torch.from_file(os.path.join(folder, f"{name} {rank}"), shared=True, size=nbytes, dtype=torch.uint8)
            for rank in range(group.size)
        ]
        _kept.append(mapped)
        return mapped[group.rank], [memory.data_ptr() for memory in mapped]

    given, peers._shared_memory = peers._shared_memory, shared_memory
    try:
        found = []
        for number, case in enumerate(cases):
            found.append(_exchanged(Peers(group, 2**16, 2**16, torch.device("cpu"), str(number)), mesh, *case))
    finally:
        peers._shared_memory = given
        _kept.clear()
    mesh.close()
    return found


_kept: list[Any] = []


def _exchanged(mine: Peers, mesh: Mesh, batch: int, tokens: Sequence[int], heads: int, dim: int, dtype: str) -> bool:
    group = mesh.group("ulysses")
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, sum(tokens), heads, dim, generator=generator).to(getattr(torch, dtype)).unbind(0)
    # Not contiguous, as parts of one projection are.
    whole = torch.stack([q, k, v], dim=2).unbind(2)
    start, share = sum(tokens[: group.rank]), heads // group.size
    own = [each[:, start : start + tokens[group.rank]] for each in whole]
    mine._memory[256:] = 255
    mesh.control.all_gather_objects(None)
    received = mine.heads_for_tokens(*own, tokens)
    here = slice(group.rank * share, (group.rank + 1) * share)
    right = [torch.equal(ours, each[:, :, here]) for ours, each in zip(received, whole, strict=True)]
    back = mine.tokens_for_heads(received[1], tokens)
    return all(right) and torch.equal(back, own[1])
