"""The state of one pipeline call, carried by a context variable so that threads and views never see each other's.

Middleware, processors and caches ask `current_call()`; outside a call it is None and they act as stock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from pipeboost.core.errors import Cancelled
from pipeboost.distributed import Mesh

_current: ContextVar[Call | None] = ContextVar("pipeboost_call", default=None)
_opening = threading.RLock()
_open: dict[Call, int] = {}
"""The calls that are open, and the thread that each is in."""
T = TypeVar("T")


class Slot(Generic[T]):
    """What a feature keeps for the length of one call: it declares `SHARDS = Slot[Shards]()` and uses `call[SHARDS]`.

    Args:
        initial: makes the value that a call begins with; without it the slot is empty until it is set.
    """

    def __init__(self, initial: Callable[[], T] | None = None) -> None:
        self.initial = initial


@dataclass(eq=False, repr=False)
class Call:
    """One run of a pipeline's `__call__`.

    Attributes:
        pipe: the pipeline, or the view of it, that was called.
        device: where its script runs.
        mesh: the ranks that run it together; None where it runs on one.
        watched: the same, also where `mesh` is None for a while.
        owner: the applied plan whose call it is; middleware of another acceleration does nothing in it.
        arguments: the arguments of the call by parameter name, defaults included.
        features: names of the features that this call's plan has on; None for all. A transformer may be shared with a
            pipeline whose plan differs.
        step: how many times `scheduler.step` has returned.
        branch: how many forwards of a denoiser began since the last `scheduler.step` (CFG branches, in order), minus 1.
        events: named time spans, in order, as a report reads them.
        decided: what outer middleware decided for the forward at hand that inner middleware obeys and its arguments do
            not show; a forward that is replayed is one with the same decisions.
        captures: whether the forward at hand is rehearsed or captured for a CUDA graph, in which launches cost nothing.
        resources: closed when the call ends, whether it returns or raises.
        of_several_ranks: whether other ranks work on the same sample, also where `mesh` is None for a while.
        rebind: applies the plan to what the pipeline consists of now; set by the acceleration.
    """

    pipe: Any
    owner: Any
    arguments: dict[str, Any]
    features: frozenset[str] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    mesh: Mesh | None = None
    step: int = 0
    branch: int = -1
    events: list[Any] = field(default_factory=list)
    decided: set[Hashable] = field(default_factory=set)
    captures: bool = False
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    rebind: Callable[[], None] | None = None
    _slots: dict[Slot[Any], Any] = field(default_factory=dict)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.watched = self.mesh
        self.of_several_ranks = self.mesh is not None and self.mesh.control.size > 1
        self._scheduler = getattr(self.pipe, "scheduler", None)

    def __getitem__(self, slot: Slot[T]) -> T:
        if slot.initial is not None and slot not in self._slots:
            self._slots[slot] = slot.initial()
        value: T = self._slots[slot]
        return value

    def __setitem__(self, slot: Slot[T], value: T) -> None:
        self._slots[slot] = value

    def get(self, slot: Slot[T]) -> T | None:
        """Return what is in a slot; None where nothing has been put there."""
        return self._slots.get(slot)

    def pop(self, slot: Slot[T]) -> T | None:
        """Empty a slot and return what was in it."""
        return self._slots.pop(slot, None)

    def has(self, feature: str) -> bool:
        """Whether a feature acts in this call."""
        return self.features is None or feature in self.features

    def follow_scheduler(self) -> None:
        """Bind a scheduler that the user put on the pipeline during the call, so that steps go on counting."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is not self._scheduler:
            self._scheduler = scheduler
            if self.rebind is not None:
                self.rebind()

    def cancel(self) -> None:
        """Make the call raise `Cancelled` at its next step; may be called from any thread.

        Where several ranks run it, one of them is enough: all raise at the same step, a step or two later.
        """
        self._cancelled.set()

    @property
    def is_to_be_cancelled(self) -> bool:
        """Whether someone asked for it, on this rank."""
        return self._cancelled.is_set()

    def raise_if_cancelled(self) -> None:
        """Raise `Cancelled` if someone asked for it; of several ranks none does so alone."""
        if self._cancelled.is_set() and not self.of_several_ranks:
            raise self.cancelled()

    def cancelled(self) -> Cancelled:
        """Return what a cancelled call raises."""
        return Cancelled(f"the call was cancelled after step {self.step}")


def current_call() -> Call | None:
    """Return the call that this thread is in, or None."""
    return _current.get()


@contextlib.contextmanager
def open_call(
    pipe: Any,
    *,
    owner: Any,
    arguments: dict[str, Any] | None = None,
    features: frozenset[str] | None = None,
    device: torch.device | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Call]:
    """Open a call for the length of a `with` block; calls nest, and the inner one is current."""
    call = Call(pipe, owner, arguments or {}, features, device or torch.device("cpu"), mesh)
    token = _current.set(call)
    with _opening:
        _open[call] = threading.get_ident()
    try:
        with call.resources:
            yield call
    finally:
        with _opening:
            del _open[call]
        _current.reset(token)


@contextlib.contextmanager
def alone() -> Iterator[bool]:
    """Yield whether no other thread has a call open. Inside, none opens or ends one."""
    with _opening:
        yield all(thread == threading.get_ident() for thread in _open.values())


def no_call() -> contextlib.AbstractContextManager[None]:
    """Inside, everything runs as if no call were open, that is, as stock."""
    return assigned(_current, None)


@contextlib.contextmanager
def assigned(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Inside, a context variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


_tracing = threading.local()


@contextlib.contextmanager
def tracing_our_call() -> Iterator[None]:
    """Inside, torch.compile traces code that will run in our calls only. A context variable could not be traced."""
    before = getattr(_tracing, "ours", False)
    _tracing.ours = True
    try:
        yield
    finally:
        _tracing.ours = before


@torch.compiler.assume_constant_result
def is_tracing_our_call() -> bool:
    """Whether `tracing_our_call` is open in this thread; while tracing, the answer is a constant without a guard."""
    return getattr(_tracing, "ours", False)
