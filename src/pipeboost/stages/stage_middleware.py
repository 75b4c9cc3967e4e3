"""What happens at a stage's method: the user's stages before it, the stage itself as a span, and those after it.

`on_ranks`: the ranks of a call share a stage's work as its `StageParallelism` says, and all have its outcome.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any

import torch
from torch.nn import Module

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.errors import PipeboostError
from pipeboost.core.families import StageDoor
from pipeboost.core.locks import Locks
from pipeboost.core.seams import Middleware
from pipeboost.distributed import Mesh, broadcast_outcome
from pipeboost.distributed.agreement.arguments import fingerprint, generators_in, global_state, set_global_state
from pipeboost.features.parallel.cfg_parallel import without_cfg_parallel
from pipeboost.stages.by_name import Arguments, ResultForm, named_results
from pipeboost.stages.composition import STAGES, BuiltInStage
from pipeboost.stages.spans import RECORDER, WAITING
from pipeboost.stages.stage import Stage, StageParallelism, Values, verified

_locks = Locks()
_RUNS = Slot[Counter[str]](Counter)
"""How often each stage has run in the call."""
_EVERY_RANK = (StageParallelism.REPLICATED, StageParallelism.TENSOR_PARALLEL)
_ABSENT = object()


@functools.cache
def middleware_of_stage(door: StageDoor) -> Middleware:
    """Return the middleware of a stage's method, one object for all objects that have it."""

    def run_stage(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return call_next(*args, **kwargs)
        call.raise_if_cancelled()
        stages = call[STAGES]
        users, at = stages.users.get(door.stage, ((), 0)) if door.stage not in stages.inside else ((), 0)

        def stock(*args: Any, **kwargs: Any) -> Any:
            """Do the method's own work, as a span of its stage."""
            parallelism = stages.parallelisms.get(door.stage, StageParallelism.REPLICATED)
            work = functools.partial(call_next, *args, **kwargs)
            pipe = None if door.component else owner
            with _alone_with_what_it_shares(call, door, owner), call[RECORDER].span(door.stage):
                return on_ranks(call, door.stage, parallelism, work, given=(*args, *kwargs.values()), pipe=pipe)

        stages.inside.append(door.stage)
        try:
            if users:
                return _compose(call, users, at, door, stock, Arguments(owner, door.method, args, kwargs))
            return stock(*args, **kwargs)
        finally:
            stages.inside.pop()

    return run_stage


def run_user_stage(
    call: Call, stage: Stage, values: Values, *, more: Callable[[], Any] = lambda: None
) -> tuple[Values, Any]:
    """Load, verify and run one of the user's stages, as a span of its name.

    Returns:
        Its values, and what `more()` returned afterwards on a rank that ran it.

    Raises:
        StageVerificationError: it has something against its input or output.
        PipeboostError: it returned something else than values by name.
    """

    def work() -> tuple[Values, Any]:
        call[STAGES].composition.load(stage)
        with without_cfg_parallel(call):
            result = stage.run(dict(verified(stage, "input", values)))
        if not isinstance(result, dict):
            raise PipeboostError(
                f"stage {stage.name!r} returned {type(result).__name__}; run() must return its values as a dict"
            )
        return verified(stage, "output", result), more()

    with call[RECORDER].span(stage.name):
        result: tuple[Values, Any] = on_ranks(call, stage.name, stage.parallelism, work, given=tuple(values.values()))
        return result


def _compose(
    call: Call, stages: Sequence[Stage], at: int, door: StageDoor, stock: Callable[..., Any], arguments: Arguments
) -> Any:
    values = arguments.values
    forms: list[ResultForm | None] = [None]
    for stage in stages[:at]:
        values, _ = run_user_stage(call, stage, values)

    def work(changed: Values) -> Values:
        changed_args, changed_kwargs = arguments.changed_to(changed)
        result = stock(*changed_args, **changed_kwargs)
        forms.append(ResultForm.of(result, door.outputs))
        return named_results(result, door.outputs)

    if isinstance(stages[at], BuiltInStage):
        outputs = work(values)
        form = forms[-1]
    else:
        replaced = call[STAGES].replaced
        replaced[door.stage] = work
        try:
            # Where another rank has run it, the form comes from there.
            outputs, form = run_user_stage(call, stages[at], values, more=lambda: forms[-1])
        finally:
            del replaced[door.stage]
    for stage in stages[at + 1 :]:
        outputs, _ = run_user_stage(call, stage, outputs)
    return (form or ResultForm.expected(values, outputs, door.outputs)).filled(outputs)


@contextlib.contextmanager
def _alone_with_what_it_shares(call: Call, door: StageDoor, owner: Any) -> Iterator[None]:
    """Views in threads share components, of which some keep the state of a call.

    Video VAEs keep their convolution caches on the module. A tokenizer keeps padding and truncation of the last call in
    itself, so that another thread's call in between is tokenized with them.
    """
    if door.component:
        shared = [owner]
    elif door.method.startswith("encode_"):
        components = owner.components.items()
        shared = [each for name, each in components if name != "scheduler" and not isinstance(each, (Module, NoneType))]
    else:
        shared = []
    with contextlib.ExitStack() as stack:
        # In one order everywhere, so that two calls never wait for each other.
        for component in sorted(shared, key=id):
            lock = _locks.of(component)
            if not lock.acquire(blocking=False):
                with call[RECORDER].span(WAITING):
                    lock.acquire()
            stack.callback(lock.release)
        yield


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


def _state(generators: list[torch.Generator], device: torch.device, pipe: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return what a stage may change besides its results: random state, and attributes of the pipeline."""
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
