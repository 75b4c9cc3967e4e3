"""Waiting for other ranks: the one place where collectives are waited for, and what excuses a rank that is late.

While a call is watched (`watch`), its `Waiter` stands here; otherwise waiting is torch's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group

querying = threading.Lock()
"""Held while a thread asks the GPU whether something is done, which nobody may while a CUDA graph is captured."""
_waiters: dict[str, Waiter] = {}
_busy: list[str] = []


class Waiter(Protocol):
    """Who waits for the groups of a mesh while one of its calls runs."""

    def finish(self, work: Any, group: Group, what: str) -> None:
        """Wait for a collective of a group, which has just begun."""

    def expecting(self, group: Group, what: str) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """As `expecting`."""

    def follow(self, group: Group, what: str) -> None:
        """Watch what this rank has just given its GPU to do, which takes all ranks of the group."""

    def begin_transfer(self, group: Group, sent: Sequence[int], received: Sequence[int]) -> Any:
        """A transfer has begun. What this returns is given to `finish_transfer`."""

    def finish_transfer(self, begun: Any, works: Sequence[Any], group: Group, what: str) -> None:
        """Wait for a transfer."""


def finish(work: Any, group: Group, what: str) -> None:
    """Wait for a collective that has just begun: on a CPU until it is done, on a GPU the current stream does.

    Raises:
        RankFailedError: inside a watched call, another rank will not do its part.
    """
    waiter = _waiters.get(group.name)
    if waiter is None:
        work.wait()
    else:
        waiter.finish(work, group, what)


@contextlib.contextmanager
def expecting(group: Group, what: str) -> Iterator[Callable[[], None]]:
    """Inside, this thread waits by other means than a collective for all ranks of a group.

    Args:
        what: is expected, for messages.

    Yields:
        Raises `RankFailedError` where another rank has failed; to be called now and then.
    """
    waiter = _waiters.get(group.name)
    if waiter is None:
        yield _no_news
        return
    with waiter.expecting(group, what) as check:
        yield check


def _no_news() -> None:
    return None


def follow(group: Group, what: str) -> None:
    """Watch what was just put on the current stream and takes all ranks of a CUDA group, such as a replayed graph."""
    waiter = _waiters.get(group.name)
    if waiter is not None:
        waiter.follow(group, what)


class Transfer:
    """A transfer between some ranks of a group that has begun.

    Args:
        works: torch's, one or several.
        group: whose backend carries it.
        sent, received: ranks of the group that are sent to, and received from; one entry for each tensor.
        what: it is, for messages.
    """

    def __init__(self, works: Sequence[Any], group: Group, sent: Sequence[int], received: Sequence[int], what: str):
        self._works, self._group, self._what = works, group, what
        self._waiter = _waiters.get(group.name)
        self._begun = self._waiter.begin_transfer(group, sent, received) if self._waiter is not None else None

    def finish(self) -> None:
        """Wait for it, as `finish` does, and raise the same."""
        if self._waiter is not None:
            self._waiter.finish_transfer(self._begun, self._works, self._group, self._what)
        else:
            for work in self._works:
                work.wait()


@contextlib.contextmanager
def waited_for_by(waiter: Waiter, names: Sequence[str]) -> Iterator[None]:
    """Inside, `waiter` waits for the groups of these names."""
    _waiters.update(dict.fromkeys(names, waiter))
    try:
        yield
    finally:
        for name in names:
            _waiters.pop(name, None)


@contextlib.contextmanager
def busy(doing: str) -> Iterator[None]:
    """Inside, this rank loads, compiles or captures, as `doing` says: the others wait for it without a limit.

    May be entered by any thread, several times over.
    """
    with querying:
        _busy.append(doing)
    try:
        yield
    finally:
        _busy.remove(doing)


def busy_with() -> str:
    """What this process is busy with; empty if it is not."""
    doing = _busy[-1:]
    return doing[0] if doing else ""
