"""What happens at a stage's method: the user's stages before it, the stage itself as a span, and those after it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any

from torch.nn import Module

from pipeboost.contract.call import Call, current_call
from pipeboost.core.errors import PipeboostError
from pipeboost.core.families import StageDoor
from pipeboost.core.locks import Locks
from pipeboost.core.seams import Middleware
from pipeboost.features.parallel.cfg_parallel import without_cfg_parallel
from pipeboost.stages.by_name import Arguments, ResultForm, named_results
from pipeboost.stages.composition import STAGES, BuiltInStage
from pipeboost.stages.ranks import on_ranks
from pipeboost.stages.spans import RECORDER, WAITING
from pipeboost.stages.stage import Stage, StageParallelism, Values, verified

_locks = Locks()


@functools.cache
def middleware_of_stage(door: StageDoor) -> Middleware:
    """Return the middleware of a stage's method, one object for all objects that have it."""

    def run_stage(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return call_next(*args, **kwargs)
        call.raise_if_cancelled()
        stages = call[STAGES]
        users = () if door.stage in stages.inside else stages.users.get(door.stage, ())

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
                return _compose(call, users, door, stock, Arguments(owner, door.method, args, kwargs))
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
    call: Call, stages: Sequence[Stage], door: StageDoor, stock: Callable[..., Any], arguments: Arguments
) -> Any:
    at = [stage.name for stage in stages].index(door.stage)
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
