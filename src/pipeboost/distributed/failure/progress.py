"""`Progress`: what this rank and its GPU have begun together with others, and what they wait for."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from pipeboost.distributed.collectives.collective_wait import busy_with, querying
from pipeboost.distributed.collectives.groups import Group
from pipeboost.distributed.failure.records import Counts


class Waiting(NamedTuple):
    """What is waited for.

    Attributes:
        operations: those of one exchange together, by number.
        what: they are.
        since: of `time.monotonic`; infinite where it may take as long as it likes.
    """

    operations: Counts
    what: str
    since: float


class _Given(NamedTuple):
    """Something the GPU was given to do."""

    event: Any
    operations: Counts
    what: str


class Progress:
    """The `Waiter` of a mesh's groups; see `waiting`.

    Args:
        check: raises if the call has failed elsewhere.
        broken: called with what a backend raised; then `check` raises.

    Attributes:
        counts: of operations, since the mesh was made.
        open: transfers that were begun and not waited for.
    """

    def __init__(self, check: Callable[[], None], broken: Callable[[BaseException], None]) -> None:
        self._check = check
        self._broken = broken
        self.counts: Counts = {}
        self.open = 0
        self._waiting: dict[int, Waiting] = {}  # by thread
        self._listening: set[str] = set()
        self._counting = threading.Lock()
        self._given: deque[_Given] = deque()
        self._given_since = 0.0
        self._events: list[Any] = []

    def finish(self, work: Any, group: Group, what: str, *, whenever: bool = False) -> None:
        """As `waiting.finish`."""
        self._check()
        begun = self._count({group.name: (1, group.ranks)})
        if not whenever:
            self._wait((work,), begun, group, what)
            return
        self._listening.add(group.name)
        try:
            self._wait_for((work,))
        finally:
            self._listening.discard(group.name)

    @contextlib.contextmanager
    def expecting(self, group: Group, what: str, *, whenever: bool = False) -> Iterator[Callable[[], None]]:
        """As `waiting.expecting`."""
        begun, _ = self.counts.get(group.name, (0, ()))
        number = begun if group.name in self._listening else begun + 1
        with self._waiting_for({group.name: (number, group.ranks)}, what, math.inf if whenever else time.monotonic()):
            yield self._check

    def follow(self, group: Group, what: str) -> None:
        """As `waiting.follow`."""
        self._check()
        self._wait((), self._count({group.name: (1, group.ranks)}), group, what)

    def begin_transfer(self, group: Group, sent: Sequence[int], received: Sequence[int]) -> Counts:
        """Two ranks count what they say to each other by themselves: others need not say as much."""
        with self._counting:
            self.open += 1
        here = group.ranks[group.rank]
        pairs = [(here, group.ranks[rank]) for rank in sent] + [(group.ranks[rank], here) for rank in received]
        return self._count({f"{group.name}: {a} to {b}": (pairs.count((a, b)), (a, b)) for a, b in pairs})

    def finish_transfer(self, begun: Counts, works: Sequence[Any], group: Group, what: str) -> None:
        """As `waiting.Transfer.finish`."""
        self._check()
        self._wait(works, begun, group, what)
        with self._counting:
            self.open -= 1

    def _count(self, operations: Counts) -> Counts:
        begun = {
            operation: (self.counts.get(operation, (0,))[0] + number, members)
            for operation, (number, members) in operations.items()
        }
        self.counts.update(begun)
        return begun

    def _wait(self, works: Sequence[Any], operations: Counts, group: Group, what: str) -> None:
        if group.device == "cuda":
            for work in works:
                work.wait()
            if not torch.cuda.is_current_stream_capturing():
                try:
                    event = self._events.pop()
                except IndexError:  # none is free
                    event = torch.cuda.Event()
                event.record()
                self._given.append(_Given(event, operations, what))
            return
        with self._waiting_for(operations, what, time.monotonic()):
            self._wait_for(works)

    def _wait_for(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._broken(error)
            self._check()

    @contextlib.contextmanager
    def _waiting_for(self, operations: Counts, what: str, since: float) -> Iterator[None]:
        thread = threading.get_ident()
        self._waiting[thread] = Waiting(operations, what, since)
        try:
            yield
        finally:
            del self._waiting[thread]

    def waiting(self) -> Waiting | None:
        """What this rank waits for, or its GPU: for the longest time, where several threads wait."""
        threads = tuple(self._waiting.values())
        if self._given and all(each.since == math.inf for each in threads):
            with contextlib.suppress(IndexError):  # done meanwhile
                given = self._given[0]
                return Waiting(given.operations, given.what, self._given_since)
        return min(threads, key=lambda each: each.since, default=None)

    def operations(self) -> Counts:
        """All that its threads wait for, or its GPU."""
        threads = tuple(self._waiting.values())
        longest = self.waiting()
        operations = {} if longest is None else dict(longest.operations)
        for each in threads:
            operations |= each.operations
        return operations

    def ask_gpu(self) -> None:
        """Forget what the GPU has done by now."""
        with querying:
            if busy_with():
                return  # a capture may run, in which nobody may ask
            while self._given and self._given[0].event.query():
                self._events.append(self._given.popleft().event)
                self._given_since = time.monotonic()
            if not self._given:
                self._given_since = time.monotonic()
