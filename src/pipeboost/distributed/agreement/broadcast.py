"""`shared`: work that some ranks of a sample do, and all of them have the outcome of."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NoReturn

import torch

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.agreement.serialization import Known, Parcel, memory_of, pack, tensors_in, unpack
from pipeboost.distributed.authentication import LENGTH, shared_secret, sign, verify
from pipeboost.distributed.collectives.groups import Group
from pipeboost.distributed.collectives.mesh import SAMPLE, Mesh


class _Outcome(IntEnum):
    WAITED = 0
    DONE = 1
    FAILED = 2


def shared(
    mesh: Mesh, work: Callable[[], Any], *, what: str, branch: int | None = None, known: Sequence[Any] = ()
) -> Any:
    """What `work()` returns on the ranks that do it, on all ranks of the sample. Every one of them calls this.

    Values go by the control group, tensors by that of their device. They arrive with the same dtype, shape and order in
    memory; a CUDA tensor arrives on this rank's device.

    Args:
        what: the outcome in words, for an error.
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
    outcome, content, value, parcel, error = _Outcome.WAITED, b"", None, None, None
    if here:
        try:
            value = work()
            parcel = pack(value, objects, what)
            outcome, content = _Outcome.DONE, parcel.content
        except Exception as failure:
            error = failure
            outcome, content = _Outcome.FAILED, _packed_failure(failure, mesh.control.ranks[mesh.control.rank])
    header = torch.tensor([[outcome, len(content)]])
    told = mesh.control.all_gather(header, 0, [1] * mesh.control.size).tolist()
    failed = next((rank for rank, (each, _) in enumerate(told) if each == _Outcome.FAILED), None)
    if failed is not None:
        content = _spoken(mesh.control, content, told[failed][1], failed)
        if error is not None:
            raise error
        _raise_failure(content)
    speaker = next(rank for rank, (each, _) in enumerate(told) if each == _Outcome.DONE)
    own = content
    content = _spoken(mesh.control, content, told[speaker][1], speaker)
    assert not own or tensors_in(own) == tensors_in(content), "the ranks of one branch have done the same"
    group, source = (mesh.group(*SAMPLE), 0) if branch is None else (mesh.group("cfg"), branch)
    arrived = _exchange(mesh, content, parcel, group, source, speaker)
    return value if here else unpack(content, arrived, objects, mesh.device)


def _exchange(
    mesh: Mesh, content: bytes, parcel: Parcel | None, group: Group, source: int, speaker: int
) -> list[torch.Tensor]:
    arrived = []
    for place, facts in enumerate(tensors_in(content)):
        by_device = facts.device == mesh.device.type
        sends = parcel is not None and (by_device or mesh.control.rank == speaker)
        tensor = parcel.tensors[place] if parcel is not None and sends else facts.empty(mesh.device)
        if facts.bytes:
            if by_device:
                group.broadcast(memory_of(tensor), source)
            else:
                mesh.control.broadcast(memory_of(tensor), speaker)
        arrived.append(tensor)
    return arrived


def _spoken(control: Group, content: bytes, length: int, speaker: int) -> bytes:
    """The bytes of one rank, on all."""
    if control.rank == speaker:
        message = sign(content, control.name, shared_secret())
        control.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), speaker)
        return content
    tensor = torch.empty(length + LENGTH, dtype=torch.uint8)
    control.broadcast(tensor, speaker)
    return verify(tensor.numpy().tobytes(), control.name, shared_secret())


def _packed_failure(error: Exception, rank: int) -> bytes:
    """What `rank` of the world has raised, for `_raise_failure` on another one."""
    where = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        packed = pickle.dumps((error, where))
        pickle.loads(packed)
    # Exceptions take whatever arguments they like, and a pickle of one may fail in as many ways.
    except Exception:
        text = f"{type(error).__name__} on rank {rank}: {error}"
        packed = pickle.dumps((PipeboostError(text), where))
    return packed


def _raise_failure(content: bytes) -> NoReturn:
    """Raise what another rank has raised; its cause is the traceback there."""
    error, where = pickle.loads(content)
    raise error from PipeboostError(where)
