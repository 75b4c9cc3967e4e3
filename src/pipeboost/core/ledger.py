"""The ledger: every change goes in together with its inverse, and is undone in reverse order."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pipeboost.core.errors import UnsupportedError
from pipeboost.core.seams import Middleware, add_middleware, has_middleware, remove_middleware

_lock = threading.RLock()
_shared_changes: weakref.WeakKeyDictionary[Any, dict[str, _SharedChange]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Change:
    """One change: what it is, in words, and how to take it back, which does nothing where there is nothing to undo."""

    what: str
    undo: Callable[[], None]


class Ledger:
    """Records changes with their inverses. Used as a context manager, an exception inside rolls everything back.

    A change is recorded before it is made and stays until it is undone, so that after an interrupt, at any moment of
    either, `undo` takes back what is left.

    The ledger keeps nothing alive, so a pipeline that is dropped without `undo` frees its memory at once.
    """

    def __init__(self) -> None:
        self._changes: list[Change] = []

    @property
    def changes(self) -> tuple[str, ...]:
        """What was changed, oldest first."""
        return tuple(change.what for change in self._changes)

    def record(self, what: str, undo: Callable[[], None]) -> None:
        """Note a change that is about to be made.

        Args:
            undo: its inverse; harmless where the change was not made, or only half, and when repeated.
        """
        self._changes.append(Change(what, undo))

    def add_middleware(self, obj: Any, method: str, middleware: Middleware, *, place: str) -> None:
        """Wrap a method of an object, once: middleware that is already there stays where it is."""
        if has_middleware(obj, method, middleware):
            return

        def undo() -> None:
            target = reference()
            if target is not None:
                remove_middleware(target, method, middleware)

        change = Change(f"middleware of {type(obj).__name__}.{method}", undo)
        # A user may replace a scheduler on every call: what is gone needs no undoing, nor may the ledger keep it alive.
        reference = weakref.ref(obj, lambda _: self._forget(change))
        self._changes.append(change)
        add_middleware(obj, method, middleware, place=place)

    def _forget(self, change: Change) -> None:
        try:  # noqa: SIM105 - at the interpreter's end the names of modules are None
            self._changes.remove(change)
        except ValueError:
            pass

    def share(
        self,
        obj: Any,
        kind: str,
        settings: Hashable,
        apply: Callable[[Ledger], None],
        *,
        explain: Callable[[Any], str | None] | None = None,
    ) -> bool:
        """Make a change to an object that several accelerations may hold, such as a transformer of two pipelines.

        The first holder applies it through `apply(ledger)`, the last one to leave undoes it.

        Args:
            explain: given another holder's settings, says how they differ and what to do, as the end of a sentence that
                begins with the object; None where their own words will do.

        Returns:
            Whether this ledger became a new holder (False where it holds it already).

        Raises:
            UnsupportedError: another holder applied it with different settings.
        """
        with _lock:
            shared = _shared_changes.setdefault(obj, {})
            if kind in shared and shared[kind].settings != settings:
                gc.collect()  # holders that were dropped without `undo` may wait in a cycle
            if kind in shared and not shared[kind].holders:
                shared[kind].ledger.undo()
                del shared[kind]
            change = shared.get(kind)
            if change is not None and change.settings != settings:
                why = None if explain is None else explain(change.settings)
                why = why or f"whose {kind} is {change.settings!r}, not {settings!r}; use the same settings"
                raise UnsupportedError(
                    f"this {type(obj).__name__} is shared with another accelerated pipeline {why} or call "
                    "acceleration.remove() there"
                )
            if change is not None and self in change.holders:
                return False
            self.record(f"{kind} of {type(obj).__name__}", functools.partial(self._leave, weakref.ref(obj), kind))
            if change is None:
                change = shared[kind] = _SharedChange(settings, Ledger(), weakref.WeakSet())
                with change.ledger:
                    apply(change.ledger)
            # Until then it has no holder, so that the next one to come undoes what an interrupt has left.
            change.holders.add(self)
        return True

    def share_middleware(
        self, obj: Any, method: str, middleware: Middleware, *, place: str, kind: str, settings: Hashable = None
    ) -> None:
        """Do what `add_middleware` does for an object that several accelerations may hold; see `share`."""
        self.share(obj, kind, settings, lambda inner: inner.add_middleware(obj, method, middleware, place=place))

    def _leave(self, reference: weakref.ref[Any], kind: str) -> None:
        with _lock:
            obj = reference()
            shared = _shared_changes.get(obj, {}) if obj is not None else {}
            if kind not in shared:
                return
            change = shared[kind]
            change.holders.discard(self)
            if not change.holders:
                change.ledger.undo()
                del shared[kind]

    def undo(self) -> None:
        """Take everything back, newest first. Harmless when called again.

        An inverse that fails does not keep the others from running; the first failure is raised at the end.
        """
        failure: Exception | None = None
        while latest := self._changes[-1:]:
            try:
                latest[0].undo()
            except Exception as error:
                failure = failure or error
            self._forget(latest[0])
        if failure is not None:
            raise failure

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.undo()


@dataclass
class _SharedChange:
    settings: Hashable
    ledger: Ledger
    holders: weakref.WeakSet[Ledger]
