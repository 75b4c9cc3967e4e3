"""`on_ranks`: the ranks of a call share a stage's work as its `StageParallelism` says, and all have its outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot
from pipeboost.core.errors import UnsupportedError
from pipeboost.distributed import Mesh, shared
from pipeboost.distributed.agreement.random_state import fingerprint, generators_in, global_state, set_global_state
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
    """What `work()` returns, on every rank of the sample, wherever it ran; so are the numbers it has drawn.

    While some ranks work alone, `call.mesh` is None: doors within the stage, and layers that would talk to ranks which
    are not there, do as on one rank.

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
    generators = generators_in([*call.arguments.values(), *given])
    effects = _Effects(generators, call.device, pipe)

    def alone() -> tuple[Any, Any]:
        call.mesh = None
        effects.begin()
        try:
            return work(), effects.found()
        finally:
            call.mesh = mesh

    mine = [each for each in given if isinstance(each, (torch.Tensor, torch.Generator)) or callable(each)]
    outcome, found = shared(mesh, alone, branch=branch, known=mine, what=f"the outcome of stage {stage!r}")
    if not effects.begun:
        effects.repeat(found)
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


class _Effects:
    """What a stage leaves behind beside its results: drawn random numbers, and attributes of the pipeline.

    Args:
        generators: that it may draw from, the same on all ranks.
        device: whose global random state it may draw from.
        pipe: whose attributes it may set; None if it sets none.

    Attributes:
        begun: whether they are found on this rank.
    """

    def __init__(self, generators: list[torch.Generator], device: torch.device, pipe: Any) -> None:
        self.begun = False
        self._generators = generators
        self._device = device
        self._pipe = pipe

    def begin(self) -> None:
        """The stage begins, here."""
        self.begun = True
        self._states = [each.get_state() for each in self._generators]
        self._global = fingerprint(global_state(self._device))
        self._attributes = dict(vars(self._pipe)) if self._pipe is not None else {}

    def found(self) -> Any:
        """What it has left behind, for `repeat` on another rank."""
        drawn = [
            None if torch.equal(before, each.get_state()) else each.get_state()
            for each, before in zip(self._generators, self._states, strict=True)
        ]
        everywhere = global_state(self._device)
        attributes = dict(vars(self._pipe)) if self._pipe is not None else {}
        return (
            drawn,
            None if fingerprint(everywhere) == self._global else everywhere,
            {name: value for name, value in attributes.items() if self._attributes.get(name, _ABSENT) is not value},
        )

    def repeat(self, found: Any) -> None:
        """Leave behind here what was found on another rank."""
        drawn, everywhere, attributes = found
        for generator, state in zip(self._generators, drawn, strict=True):
            if state is not None:
                generator.set_state(state)
        if everywhere is not None:
            set_global_state(everywhere, self._device)
        for name, value in attributes.items():
            setattr(self._pipe, name, value)


def _next_branch(call: Call, mesh: Mesh, stage: str) -> int:
    runs = call[_RUNS]
    runs[stage] += 1
    return (runs[stage] - 1) % mesh.degree("cfg")
