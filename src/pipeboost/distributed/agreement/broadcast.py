"""`broadcast_outcome`: work that some ranks of a sample do, and all of them have the outcome of."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.agreement.serialization import Known, memory_of, pack, tensors_in, unpack
from pipeboost.distributed.authentication import LENGTH, shared_secret, sign, verify
from pipeboost.distributed.collectives.groups import Group
from pipeboost.distributed.collectives.mesh import SAMPLE, Mesh


class _Outcome(IntEnum):
    WAITED = 0
    DONE = 1
    FAILED = 2


def broadcast_outcome(
    mesh: Mesh, work: Callable[[], Any], *, what: str, branch: int | None = None, known: Sequence[Any] = ()
) -> Any:
    """Return what `work()` returns on the ranks that do it, on all ranks of the sample. Every one of them calls this.

    Values go by the control group, tensors by that of their device. They arrive with the same dtype, shape and order in
    memory; a CUDA tensor arrives on this rank's device.

    Args:
        what: describes the outcome, for an error.
        branch: the ranks with this index along the cfg axis do it; None for the main rank alone.
        known: objects that each rank has of its own, in one order: parts of the outcome that are not sent. A tensor
            among them that `work` wrote to is brought up to date in place.

    Raises:
        Exception: what the work has raised, on every rank; where it cannot be pickled, a `PipeboostError` with its text
            in its place on the others.
        PipeboostError: the outcome has something that cannot be pickled; on every rank.
    """
    objects = Known(known)
    here = mesh.main if branch is None else mesh.index("cfg") == branch
    outcome, content, value, error = _Outcome.WAITED, b"", None, None
    tensors: list[torch.Tensor] = []
    if here:
        try:
            value = work()
            content, tensors = pack(value, objects, what)
            outcome = _Outcome.DONE
        except Exception as failure:
            error = failure
            outcome, content = _Outcome.FAILED, _packed_failure(failure, mesh.control.ranks[mesh.control.rank])
    header = torch.tensor([[outcome, len(content)]])
    outcomes, lengths = mesh.control.all_gather(header, 0, [1] * mesh.control.size).t().tolist()
    failed = _Outcome.FAILED in outcomes
    source = outcomes.index(_Outcome.FAILED if failed else _Outcome.DONE)
    own, content = content, _broadcast(mesh.control, content, lengths[source], source)
    if error is not None:
        raise error
    if failed:
        error, where = pickle.loads(content)
        raise error from PipeboostError(where)  # the traceback there
    assert not own or tensors_in(own) == tensors_in(content), "the ranks of one branch have done the same"
    arrived = []
    for place, layout in enumerate(tensors_in(content)):
        on_device = layout.device == mesh.device.type
        group, root = mesh.control, source
        if on_device:
            group, root = (mesh.group(*SAMPLE), 0) if branch is None else (mesh.group("cfg"), branch)
        sends = here and (on_device or mesh.control.rank == source)
        tensor = tensors[place] if sends else layout.empty(mesh.device)
        if tensor.numel():
            group.broadcast(memory_of(tensor), root)
        arrived.append(tensor)
    return value if here else unpack(content, arrived, objects, mesh.device)


def _broadcast(control: Group, content: bytes, length: int, source: int) -> bytes:
    """The bytes of one rank, on all."""
    message = sign(content, control.name, shared_secret()) if control.rank == source else bytes(length + LENGTH)
    tensor = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    control.broadcast(tensor, source)
    return verify(tensor.numpy().tobytes(), control.name, shared_secret())


def _packed_failure(error: Exception, rank: int) -> bytes:
    """What `rank` of the world has raised, and its traceback, pickled."""
    where = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        packed = pickle.dumps((error, where))
        pickle.loads(packed)
    # Exceptions take whatever arguments they like, and a pickle of one may fail in as many ways.
    except Exception:
        text = f"{type(error).__name__} on rank {rank}: {error}"
        packed = pickle.dumps((PipeboostError(text), where))
    return packed
