"""What the ranks run in `test_peers`: Triton's interpreter on memory that they share, in the place of GPUs."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipeboost.distributed import Mesh, Peers
from pipeboost.distributed.collectives import symmetric_connect


def exchanges(folder: str, cases: Sequence[tuple[int, Sequence[int], int, int, str, int]]) -> list[bool]:
    """For each case (batch, tokens of each rank, heads, head_dim, dtype, parts) whether what belongs arrives.

    The receive buffers are poisoned before each; what each rank has is known to all, so that all can be compared.
    """
    with _on_cpus(folder, len(cases[0][1])) as mesh:
        from pipeboost.distributed.collectives import symmetric_kernels  # asks for the interpreter when it is imported

        # More blocks than programs: in the larger cases these go round.
        symmetric_kernels.HIDDEN = symmetric_kernels.HIDDEN._replace(block=1024, programs=2)
        return [_exchanged(_connected(mesh, str(number)), mesh, *case) for number, case in enumerate(cases)]


def refusals(folder: str) -> list[Any]:
    """What ranks are told where one has no room, one cannot reach the others, and where nothing arrives."""
    found = []
    with _on_cpus(folder, 2) as mesh:
        for name, trouble in (("_room", RuntimeError("out of memory")), ("_addresses", RuntimeError("no access"))):
            given = getattr(symmetric_connect, name)
            if mesh.index("ulysses") == 1:
                setattr(symmetric_connect, name, functools.partial(_raise, trouble))
            found.append(_connected(mesh, name))
            setattr(symmetric_connect, name, given)
        given, symmetric_connect._addresses = symmetric_connect._addresses, lambda memory: [memory.data_ptr()] * 2
        # On such a machine only the limit of the test would end a barrier.
        barrier, Peers._barrier = Peers._barrier, lambda _: None
        found.append(_connected(mesh, "own"))
        symmetric_connect._addresses, Peers._barrier = given, barrier
    return found


def _connected(mesh: Mesh, name: str) -> Any:
    return symmetric_connect.connect(mesh.group("ulysses"), 2**18, 2**18, torch.device("cpu"), name)


def _raise(error: Exception, *_: Any) -> None:
    raise error


@contextlib.contextmanager
def _on_cpus(folder: str, ranks: int) -> Iterator[Mesh]:
    """A mesh whose ranks map files in the place of each other's GPU memory."""
    os.environ["TRITON_INTERPRET"] = "1"
    mesh = Mesh({"ulysses": ranks}, device=torch.device("cpu"))
    maps: list[torch.Tensor] = []
    name = ""

    def mapped(rank: int, nbytes: int) -> torch.Tensor:
        path = os.path.join(folder, f"{name} {rank}")
        maps.append(torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8))
        return maps[-1]

    def room(nbytes: int, _: Any, registered: str) -> torch.Tensor:
        nonlocal name
        name = registered
        return mapped(mesh.index("ulysses"), nbytes)

    def addresses(memory: torch.Tensor) -> list[int]:
        others = [mapped(rank, memory.numel()).data_ptr() for rank in range(ranks)]
        return [memory.data_ptr() if rank == mesh.index("ulysses") else other for rank, other in enumerate(others)]

    given = {name: getattr(symmetric_connect, name) for name in ("_registered", "_room", "_addresses")}
    symmetric_connect._registered = lambda _, name: contextlib.nullcontext(name)
    symmetric_connect._room, symmetric_connect._addresses = room, addresses
    try:
        yield mesh
    finally:
        for function, value in given.items():
            setattr(symmetric_connect, function, value)
        mesh.close()


def _exchanged(
    mine: Peers, mesh: Mesh, batch: int, tokens: Sequence[int], heads: int, dim: int, dtype: str, parts: int
) -> bool:
    group = mesh.group("ulysses")
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, sum(tokens), heads, dim, generator=generator).to(getattr(torch, dtype)).unbind(0)
    # Not contiguous, as parts of one projection are.
    whole = torch.stack([q, k, v], dim=2).unbind(2)
    start, share = sum(tokens[: group.rank]), heads // group.size
    own = [each[:, start : start + tokens[group.rank]] for each in whole]
    mine._memory[256:] = 255
    mesh.control.all_gather_objects(None)
    first = group.rank * share
    right = []

    def attend(*received: torch.Tensor) -> torch.Tensor:
        nonlocal first
        here = slice(first, first + received[0].shape[2])
        first = here.stop
        right.extend(torch.equal(ours, each[:, :, here]) for ours, each in zip(received, whole, strict=True))
        return received[1]

    back = mine.attended(*own, tokens, attend, parts=parts)
    assert len(right) == 3 * parts
    return all(right) and first == (group.rank + 1) * share and torch.equal(back, own[1])
