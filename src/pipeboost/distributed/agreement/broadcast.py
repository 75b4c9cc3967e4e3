"""`broadcast_outcome`: work that some ranks of a sample do, and all of them have the outcome of."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.agreement.serialization import Known, memory_of, pack, unpack
from pipeboost.distributed.collectives.mesh import SAMPLE, Mesh


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
    value, packed, error, failed = None, None, None, b""
    tensors: list[torch.Tensor] = []
    if here:
        try:
            value = work()
            packed, tensors = pack(value, objects, what)
        except Exception as failure:
            error, failed = failure, _packed_failure(failure, mesh.control.ranks[mesh.control.rank])
    everyone = mesh.control.all_gather_objects((packed, failed))
    if error is not None:
        raise error
    for _, failed in everyone:
        if failed:
            error, where = pickle.loads(failed)
            raise error from PipeboostError(where)  # the traceback there
    source = next(rank for rank, (sent, _) in enumerate(everyone) if sent is not None)
    layouts, content = everyone[source][0]
    assert packed is None or packed[0] == layouts, "the ranks of one branch have done the same"
    arrived = []
    for place, layout in enumerate(layouts):
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
