"""Waiting for other ranks: the one place where collectives are waited for, and what excuses a rank that is late."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipeboost.distributed.failure.records import Counts

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group

_querying = threading.Lock()
"""Held while a thread asks the GPU whether something is done, which nobody may while a CUDA graph is captured."""
_doing: list[str] = []


@contextlib.contextmanager
def suspend_timeout(doing: str) -> Iterator[None]:
    """Inside, this rank loads, compiles or captures, as `doing` says: the others wait for it while it lives.

    May be entered by any thread, several times over.
    """
    with _querying:
        _doing.append(doing)
    try:
        yield
    finally:
        _doing.remove(doing)


def suspended_for() -> str:
    """Return what suspends the time-out in this process; empty if nothing does."""
    latest = _doing[-1:]
    return latest[0] if latest else ""


def finish(group: Group, description: str, *works: Any) -> None:
    """Wait for a collective that has just begun: on a CPU until it is done, on a GPU the current stream does.

    Raises:
        RankFailedError: inside a watched call, another rank will not do its part.
    """
    group.operations.finish(works, group.operations.count({group.name: (1, group.ranks)}), group, description)


def follow(group: Group, description: str) -> None:
    """Watch what was just put on the current stream and takes all ranks of a CUDA group, such as a replayed graph."""
    finish(group, description)


@contextlib.contextmanager
def expecting(group: Group, description: str) -> Iterator[Callable[[], None]]:
    """Inside, this thread waits by itself for what takes all ranks of a group.

    Yields:
        Raises `RankFailedError` where another rank has failed; to be called now and then.
    """
    begun, _ = group.operations.counts.get(group.name, (0, ()))
    with group.operations.waiting_for({group.name: (begun + 1, group.ranks)}, description):
        yield group.operations.check


class Pending:
    """A transfer between some ranks of a group that has begun: `sent` and `received` have a rank for each tensor."""

    def __init__(
        self, works: Sequence[Any], group: Group, sent: Sequence[int], received: Sequence[int], description: str
    ) -> None:
        self._works, self._group, self._description = works, group, description
        here = group.ranks[group.rank]
        # Two ranks count what they send each other by themselves: others need not send as much.
        pairs = [(here, group.ranks[rank]) for rank in sent] + [(group.ranks[rank], here) for rank in received]
        begun: Counts = {f"{group.name}: {a} to {b}": (pairs.count((a, b)), (a, b)) for a, b in pairs}
        self._begun = group.operations.count(begun)
        group.operations.open.append(description)

    def wait(self) -> None:
        """Go on once it is done; on a GPU the stream goes on then, not the host. Once only; raises as `finish` does."""
        operations = self._group.operations
        operations.finish(self._works, self._begun, self._group, self._description)
        operations.open.remove(self._description)


class Waiting(NamedTuple):
    """What is waited for, by number, those of one exchange together, and since when by `time.monotonic`."""

    operations: Counts
    description: str
    since: float


class Operations:
    """What this rank and its GPU have begun together with others, and what they wait for.

    `check` raises if the call has failed elsewhere, and does so after `broken` was called with what a backend raised.
    """

    def __init__(
        self, check: Callable[[], None] = lambda: None, broken: Callable[[BaseException], None] = lambda error: None
    ) -> None:
        self.check = check
        self._broken = broken
        self.counts: Counts = {}
        self.open: list[str] = []  # transfers that were begun and not waited for
        self._waiting: dict[int, Waiting] = {}  # by thread
        self._given: deque[tuple[Any, Counts, str]] = deque()  # to the GPU: an event, operations, their description
        self._given_since = 0.0
        self._events: list[Any] = []

    def count(self, operations: Counts) -> Counts:
        """Count so many of each kind that have begun; return their numbers."""
        begun = {
            operation: (self.counts.get(operation, (0,))[0] + number, members)
            for operation, (number, members) in operations.items()
        }
        self.counts.update(begun)
        return begun

    def finish(self, works: Sequence[Any], begun: Counts, group: Group, description: str) -> None:
        """Wait for what has begun: on a CPU until it is done, on a GPU the current stream does."""
        self.check()
        if group.device == "cuda":
            for work in works:
                work.wait()
            if not torch.cuda.is_current_stream_capturing():
                try:
                    event = self._events.pop()
                except IndexError:  # none is free
                    event = torch.cuda.Event()
                event.record()
                self._given.append((event, begun, description))
            return
        try:
            with self.waiting_for(begun, description):
                for work in works:
                    work.wait()
        except RuntimeError as error:
            self._broken(error)
            self.check()
            raise

    @contextlib.contextmanager
    def waiting_for(self, operations: Counts, description: str) -> Iterator[None]:
        """Inside, this thread waits for these operations."""
        thread = threading.get_ident()
        self._waiting[thread] = Waiting(operations, description, time.monotonic())
        try:
            yield
        finally:
            self._waiting.pop(thread, None)  # Ctrl-C may have come in between

    def waiting(self) -> Waiting | None:
        """Return all that this rank's threads wait for, described as what takes longest; else what its GPU does."""
        threads = sorted(self._waiting.values(), key=lambda each: each.since)
        if threads:
            together = {name: counted for each in threads for name, counted in each.operations.items()}
            return threads[0]._replace(operations=together)
        with contextlib.suppress(IndexError):  # nothing, or done meanwhile
            _, operations, description = self._given[0]
            return Waiting(operations, description, self._given_since)
        return None

    def ask_gpu(self) -> None:
        """Forget what the GPU has done by now."""
        with _querying:
            if suspended_for():
                return  # a capture may run, in which nobody may ask
            while self._given and self._given[0][0].query():
                self._events.append(self._given.popleft()[0])
                self._given_since = time.monotonic()
            if not self._given:
                self._given_since = time.monotonic()
