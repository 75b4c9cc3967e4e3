"""What happens at a stage's door: the user's stages before it, the stage itself as a span, and those after it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, SimpleNamespace
from typing import Any

from torch.nn import Module

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.errors import PipeboostError
from pipeboost.core.families import StageDoor
from pipeboost.core.seams import Middleware, stock_class
from pipeboost.features.parallel.cfg_parallel import apart
from pipeboost.stages.composition import STOCK_WORK, Composition, UserStages
from pipeboost.stages.ranks import on_ranks
from pipeboost.stages.spans import WAITING, recorder_of
from pipeboost.stages.stage import Stage, StageParallelism, Values, verified

COMPOSITION = Slot[Composition]()
_USER_STAGES = Slot[Mapping[str, UserStages]]()
_PARALLELISMS = Slot[Mapping[str, StageParallelism]]()
_INSIDE = Slot[list[str]](list)
"""The built-in stages whose methods the call is inside of."""

_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


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
            with _locks_lock:
                lock = _locks.setdefault(component, threading.RLock())
            if not lock.acquire(blocking=False):
                with recorder_of(call).span(WAITING):
                    lock.acquire()
            stack.callback(lock.release)
        yield


@functools.cache
def middleware_of_stage(door: StageDoor) -> Middleware:
    """The layer for a door, one object for all that stand in the same."""

    def pass_through(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return call_next(*args, **kwargs)
        call.raise_if_cancelled()
        inside, users = call[_INSIDE], user_stages(call)
        around = None if door.stage in inside else users.get(door.stage)
        inside.append(door.stage)
        try:
            if around is not None:
                return _compose(call, around, door, call_next, owner, args, kwargs)
            return _stock(call, door, call_next, owner, args, kwargs)
        finally:
            inside.pop()

    return pass_through


def user_stages(call: Call) -> Mapping[str, UserStages]:
    """The user's stages as they were when the call began.

    Raises:
        UnsupportedError: the call's ranks cannot share a stage as it asks for.
    """
    users = call.get(_USER_STAGES)
    if users is None:
        composition = call.get(COMPOSITION)
        call[_PARALLELISMS] = {} if composition is None else composition.parallelisms(call.mesh)
        users = call[_USER_STAGES] = {} if composition is None else composition.user_stages()
    return users


def run_user_stage(call: Call, stage: Stage, values: Values) -> Values:
    """Load, verify and run one of the user's stages, as a span of its name.

    Raises:
        StageVerificationError: it has something against its input or output.
        PipeboostError: it returned something else than values by name.
    """
    return _run_user_stage(call, stage, values, lambda: None)[0]


def _run_user_stage(call: Call, stage: Stage, values: Values, more: Callable[[], Any]) -> tuple[Values, Any]:
    """As `run_user_stage`; and what `more()` says afterwards where the stage has run."""

    def work() -> tuple[Values, Any]:
        call[COMPOSITION].load(stage)
        with apart(call):
            result = stage.run(dict(verified(stage, stage.name, "input", values)))
        if not isinstance(result, dict):
            raise PipeboostError(
                f"stage {stage.name!r} returned {type(result).__name__}; run() must return its values as a dict"
            )
        return verified(stage, stage.name, "output", result), more()

    with recorder_of(call).span(stage.name):
        result: tuple[Values, Any] = on_ranks(call, stage.name, stage.parallelism, work, given=tuple(values.values()))
        return result


def _stock(
    call: Call,
    door: StageDoor,
    call_next: Callable[..., Any],
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The door's own work, as a span of its stage."""
    parallelism = call[_PARALLELISMS].get(door.stage, StageParallelism.REPLICATED)
    work = functools.partial(call_next, *args, **kwargs)
    pipe = None if door.component else owner
    with _alone_with_what_it_shares(call, door, owner), recorder_of(call).span(door.stage):
        return on_ranks(call, door.stage, parallelism, work, given=(*args, *kwargs.values()), pipe=pipe)


@dataclass(frozen=True)
class _Form:
    """How a door returns its results.

    Attributes:
        kind: the class of a mapping, `tuple`, `object` for a result by itself, `NoneType` for none.
        order: the results' names.
    """

    kind: type
    order: tuple[str, ...]

    @classmethod
    def of(cls, result: Any, names: tuple[str, ...]) -> _Form:
        kind: type = type(result) if isinstance(result, (Mapping, NoneType)) else object
        return cls(tuple if isinstance(result, tuple) else kind, tuple(named_results(result, names)))

    def filled(self, values: Values) -> Any:
        if self.kind is NoneType:
            return None
        missing = [name for name in self.order if name not in values]
        if missing:
            raise PipeboostError(
                f"a stage left out {', '.join(map(repr, missing))}; run() returns all of {', '.join(self.order)}"
            )
        if self.kind is tuple:
            return tuple(values[name] for name in self.order)
        if self.kind is object:
            return values[self.order[0]]
        return self.kind(**{name: values[name] for name in self.order})


def named_results(result: Any, names: tuple[str, ...]) -> Values:
    """What a door returned, by name: the fields of a Diffusers output, or the elements of a tuple."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return dict(result)
    elements = result if isinstance(result, tuple) else (result,)
    return {names[i] if i < len(names) else f"output_{i}": element for i, element in enumerate(elements)}


def rebuilt(values: Values, like: Any, names: tuple[str, ...]) -> Any:
    """The inverse of `named_results`, for a result that looked like `like`.

    Raises:
        PipeboostError: the values lack a name.
    """
    return _Form.of(like, names).filled(values)


def _compose(
    call: Call,
    around: UserStages,
    door: StageDoor,
    call_next: Callable[..., Any],
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    arguments = _Arguments(getattr(stock_class(owner), door.method), owner, args, kwargs)
    values = arguments.values
    for stage in around.before:
        values = run_user_stage(call, stage, values)
    forms: list[_Form] = []

    def stock(changed: Values) -> Values:
        changed_args, changed_kwargs = arguments.changed_to(changed)
        result = _stock(call, door, call_next, owner, changed_args, changed_kwargs)
        forms.append(_Form.of(result, door.outputs))
        return named_results(result, door.outputs)

    form: _Form | None
    if around.instead is None:
        outputs = stock(values)
        form = forms[-1]
    else:
        replaced = call[STOCK_WORK]
        replaced[door.stage] = stock
        try:
            outputs, form = _run_user_stage(call, around.instead, values, lambda: forms[-1] if forms else None)
        finally:
            del replaced[door.stage]
    for stage in around.after:
        outputs = run_user_stage(call, stage, outputs)
    return form.filled(outputs) if form is not None else _as_the_script_expects(outputs, door, values)


def _as_the_script_expects(outputs: Values, door: StageDoor, arguments: Values) -> Any:
    """The result of a door whose own work was not done, so that there is nothing to look like."""
    if not door.outputs:
        return None
    missing = [name for name in door.outputs if name not in outputs]
    if missing:
        raise PipeboostError(
            f"the stage that replaces {door.stage!r} left out {', '.join(map(repr, missing))} of its results"
        )
    if arguments.get("return_dict") is True:
        return SimpleNamespace(**outputs)
    order = list(door.outputs)
    while (further := f"output_{len(order)}") in outputs:
        order.append(further)
    if len(order) > 1 or "return_dict" in arguments:
        return tuple(outputs[name] for name in order)
    return outputs[order[0]]


class _Arguments:
    """A door's arguments by name, and the way back to a call."""

    def __init__(self, method: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._bound = inspect.signature(method).bind(owner, *args, **kwargs)
        self._bound.apply_defaults()
        parameters = self._bound.signature.parameters.values()
        self._rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
        self._owner_name = next(iter(self._bound.arguments))

    @property
    def values(self) -> Values:
        """Every argument but the object itself; those in `**kwargs` by their own names."""
        named = {name: value for name, value in self._bound.arguments.items() if name != self._owner_name}
        rest = named.pop(self._rest) if self._rest is not None else {}
        return {**named, **rest}

    def changed_to(self, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call with these values.

        Raises:
            PipeboostError: a value has a name that the door does not take.
        """
        bound = inspect.BoundArguments(self._bound.signature, dict(self._bound.arguments))
        if self._rest is not None:
            bound.arguments[self._rest] = {}
        for name, value in values.items():
            if name in bound.arguments and name not in (self._owner_name, self._rest):
                bound.arguments[name] = value
            elif self._rest is not None:
                bound.arguments[self._rest][name] = value
            else:
                known = ", ".join(self.values)
                raise PipeboostError(
                    f"a stage returned the value {name!r}, which this door does not take; it has {known}"
                )
        return bound.args[1:], bound.kwargs
