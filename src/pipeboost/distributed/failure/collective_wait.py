"""Waiting for other ranks: the one place where collectives are waited for.

While a call is watched (`watchdog`), its `Operations` stand here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipeboost.distributed.failure.records import Counts
from pipeboost.distributed.failure.suspend_timeout import querying, suspended_for

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group

_watched: dict[str, Operations] = {}


def operations_of(group: Group) -> Operations:
    """Return where a group's operations are counted; outside a watched call nobody asks for what they count."""
    return _watched.get(group.name) or Operations()


def finish(work: Any, group: Group, description: str) -> None:
    """Wait for a collective that has just begun: on a CPU until it is done, on a GPU the current stream does.

    Raises:
        RankFailedError: inside a watched call, another rank will not do its part.
    """
    operations = operations_of(group)
    operations.finish((work,), operations.begin(group), group, description)


def follow(group: Group, description: str) -> None:
    """Watch what was just put on the current stream and takes all ranks of a CUDA group, such as a replayed graph."""
    operations = operations_of(group)
    operations.finish((), operations.begin(group), group, description)


@contextlib.contextmanager
def expecting(group: Group, description: str) -> Iterator[Callable[[], None]]:
    """Inside, this thread waits by itself for what takes all ranks of a group.

    Yields:
        Raises `RankFailedError` where another rank has failed; to be called now and then.
    """
    operations = operations_of(group)
    begun, _ = operations.counts.get(group.name, (0, ()))
    with operations.waiting_for({group.name: (begun + 1, group.ranks)}, description):
        yield operations.check


class Pending:
    """A transfer between some ranks of a group that has begun: `sent` and `received` have a rank for each tensor."""

    def __init__(
        self, works: Sequence[Any], group: Group, sent: Sequence[int], received: Sequence[int], description: str
    ) -> None:
        self._works, self._group, self._description = works, group, description
        self._operations = operations_of(group)
        self._begun = self._operations.begin_transfer(group, sent, received)

    def wait(self) -> None:
        """Go on once it is done; on a GPU the stream goes on then, not the host. Once only; raises as `finish` does."""
        self._operations.finish(self._works, self._begun, self._group, self._description)
        self._operations.end_transfer()


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
        self.counts: Counts = {}  # since the mesh was made
        self.open = 0  # transfers that were begun and not waited for
        self._waiting: dict[int, Waiting] = {}  # by thread
        self._counting = threading.Lock()
        self._given: deque[tuple[Any, Counts, str]] = deque()  # to the GPU: an event, operations, their description
        self._given_since = 0.0
        self._events: list[Any] = []

    @contextlib.contextmanager
    def of(self, groups: Sequence[Group]) -> Iterator[None]:
        """Inside, these groups are waited for here."""
        names = [group.name for group in groups]
        _watched.update(dict.fromkeys(names, self))
        try:
            yield
        finally:
            for name in names:
                _watched.pop(name, None)

    def begin(self, group: Group) -> Counts:
        """Count a collective of a group; what `finish` waits for."""
        self.check()
        return self._count({group.name: (1, group.ranks)})

    def begin_transfer(self, group: Group, sent: Sequence[int], received: Sequence[int]) -> Counts:
        """Count a transfer: two ranks count what they say to each other by themselves, others need not say as much."""
        with self._counting:
            self.open += 1
        here = group.ranks[group.rank]
        pairs = [(here, group.ranks[rank]) for rank in sent] + [(group.ranks[rank], here) for rank in received]
        return self._count({f"{group.name}: {a} to {b}": (pairs.count((a, b)), (a, b)) for a, b in pairs})

    def end_transfer(self) -> None:
        """One of them was waited for."""
        with self._counting:
            self.open -= 1

    def _count(self, operations: Counts) -> Counts:
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
        with querying:
            if suspended_for():
                return  # a capture may run, in which nobody may ask
            while self._given and self._given[0][0].query():
                self._events.append(self._given.popleft()[0])
                self._given_since = time.monotonic()
            if not self._given:
                self._given_since = time.monotonic()
