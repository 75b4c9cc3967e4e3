"""`on_ranks`: the ranks of a call share a stage's work as its `StageParallelism` says, and all have its outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot
from pipeboost.core.errors import UnsupportedError
from pipeboost.distributed import Mesh, broadcast_outcome
from pipeboost.distributed.agreement.arguments import fingerprint, generators_in, global_state, set_global_state
from pipeboost.stages.stage import StageParallelism

_RUNS = Slot[Counter[str]](Counter)
"""How often each stage has run in the call."""
_EVERY_RANK = (StageParallelism.REPLICATED, StageParallelism.TENSOR_PARALLEL)
_ABSENT = object()


def on_ranks(
    call: Call,
    stage: str,
    parallelism: StageParallelism,
    work: Callable[[], Any],
    *,
    given: Sequence[Any],
    pipe: Any = None,
) -> Any:
    """Return what `work()` returns on every rank of the sample, wherever it ran; so with the numbers it has drawn.

    While some ranks work alone, `call.mesh` is None: methods within the stage, and middleware that would talk to ranks
    which are not there, do as on one rank.

    Args:
        stage: its name.
        given: what the stage works on. Tensors, generators and callables among these are not sent when they come out
            again; a tensor that was written to is brought up to date in place.
        pipe: the pipeline whose attributes the work may set; the other ranks get them too.

    Raises:
        Exception: what the work has raised, on all ranks.
        PipeboostError: something in the outcome cannot be sent.
    """
    mesh = call.mesh
    if mesh is None or mesh.control.size == 1 or parallelism in _EVERY_RANK:
        return work()
    branch = _next_branch(call, mesh, stage) if parallelism is StageParallelism.CFG_PARALLEL else None
    touched = (generators_in([*call.arguments.values(), *given]), call.device, pipe)
    ran = False

    def alone() -> tuple[Any, Any]:
        nonlocal ran
        ran, call.mesh = True, None
        before = _state(*touched)
        try:
            result = work()
            return result, _changes(before, _state(*touched))
        finally:
            call.mesh = mesh

    mine = [each for each in given if isinstance(each, (torch.Tensor, torch.Generator)) or callable(each)]
    outcome, changes = broadcast_outcome(mesh, alone, branch=branch, known=mine, what=f"the outcome of stage {stage!r}")
    if not ran:
        _repeat(changes, *touched)
    return outcome


def require_ranks(stage: str, parallelism: StageParallelism, mesh: Mesh) -> None:
    """Refuse a stage that these ranks cannot share.

    Raises:
        UnsupportedError: its weights are to be shared by ranks, and the mesh has none for that.
    """
    if parallelism is StageParallelism.TENSOR_PARALLEL and mesh.control.size > 1 and mesh.degree("tensor") == 1:
        raise UnsupportedError(
            f"stage {stage!r} asks for {parallelism!s}, but the mesh has no tensor ranks; use "
            "ParallelConfig(tensor=2) or more, or StageParallelism.MAIN_RANK"
        )


def _state(generators: list[torch.Generator], device: torch.device, pipe: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return what a stage may change beside its results: random state, and attributes of the pipeline."""
    attributes = {} if pipe is None else dict(vars(pipe))
    return [each.get_state() for each in generators], global_state(device), attributes


def _changes(before: tuple[Any, Any, dict[str, Any]], after: tuple[Any, Any, dict[str, Any]]) -> tuple[Any, Any, Any]:
    """Return what a stage has changed, for `_repeat` on another rank."""
    drawn = [None if torch.equal(was, now) else now for was, now in zip(before[0], after[0], strict=True)]
    everywhere = None if fingerprint(before[1]) == fingerprint(after[1]) else after[1]
    attributes = {name: value for name, value in after[2].items() if before[2].get(name, _ABSENT) is not value}
    return drawn, everywhere, attributes


def _repeat(changes: Any, generators: list[torch.Generator], device: torch.device, pipe: Any) -> None:
    drawn, everywhere, attributes = changes
    for generator, state in zip(generators, drawn, strict=True):
        if state is not None:
            generator.set_state(state)
    if everywhere is not None:
        set_global_state(everywhere, device)
    for name, value in attributes.items():
        setattr(pipe, name, value)


def _next_branch(call: Call, mesh: Mesh, stage: str) -> int:
    runs = call[_RUNS]
    runs[stage] += 1
    return (runs[stage] - 1) % mesh.degree("cfg")
