"""Waiting for other ranks: the one place where collectives are waited for, and what excuses a rank that is late."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from pipeboost.distributed.failure.records import Counts, Operation

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
    return "".join(_doing[-1:])


def finish(group: Group, description: str, *works: Any) -> None:
    """Wait for a collective that has just begun: on a CPU until it is done, on a GPU the current stream does.

    Args:
        works: none for what was put on the current stream and takes all ranks of a group, such as a replayed graph.

    Raises:
        RankFailedError: inside a watched call, another rank will not do its part.
    """
    _finish(group, description, works, group.operations.count(Operation(group.name, group.ranks)))


def _finish(group: Group, description: str, works: Sequence[Any], begun: Counts) -> None:
    operations = group.operations
    operations.check()
    if group.device == "cuda":
        for work in works:
            work.wait()
        if not torch.cuda.is_current_stream_capturing():
            operations.given.append((torch.cuda.current_stream().record_event(), begun, description))
        return
    try:
        with operations.waiting_for(begun, description):
            for work in works:
                work.wait()
    except RuntimeError as error:
        operations.check()
        raise dist.DistBackendError(f"{description}: {error}") from error


@contextlib.contextmanager
def expecting(group: Group, description: str) -> Iterator[Callable[[], None]]:
    """Inside, this thread waits by itself for what takes all ranks of a group.

    Yields:
        Raises `RankFailedError` where another rank has failed; to be called now and then.
    """
    operation = Operation(group.name, group.ranks)
    with group.operations.waiting_for({operation: group.operations.counts[operation] + 1}, description):
        yield group.operations.check


class Pending:
    """A transfer between some ranks of a group that has begun: `sent` and `received` have a rank for each tensor."""

    def __init__(
        self, works: Sequence[Any], group: Group, sent: Sequence[int], received: Sequence[int], description: str
    ) -> None:
        self._works, self._group, self._description = works, group, description
        here, ranks = group.ranks[group.rank], group.ranks
        # Two ranks count what they send each other by themselves: others need not send as much.
        pairs = [(here, ranks[rank]) for rank in sent] + [(ranks[rank], here) for rank in received]
        self._begun = group.operations.count(*(Operation(f"{group.name} to", pair) for pair in pairs))
        group.operations.open.append(description)

    def wait(self) -> None:
        """Go on once it is done; on a GPU the stream goes on then, not the host. Once only; raises as `finish` does."""
        _finish(self._group, self._description, self._works, self._begun)
        self._group.operations.open.remove(self._description)


class Waiting(NamedTuple):
    """What is waited for, by number, those of one exchange together, and since when by `time.monotonic`."""

    operations: Counts
    description: str
    since: float


class Operations:
    """What this rank and its GPU have begun together with others, and what they wait for.

    `check` raises if the call has failed elsewhere.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self.counts: Counter[Operation] = Counter()
        self.open: list[str] = []  # transfers that were begun and not waited for
        self.given: deque[tuple[Any, Counts, str]] = deque()  # to the GPU: an event, operations, their description
        self._given_since = 0.0
        self._waiting: dict[int, Waiting] = {}  # by thread

    def count(self, *operations: Operation) -> Counts:
        """Count operations that have begun; return the number of the last of each kind."""
        self.counts.update(operations)
        return {each: self.counts[each] for each in operations}

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
            return threads[0]._replace(operations={name: n for each in threads for name, n in each.operations.items()})
        with contextlib.suppress(IndexError):  # nothing, or done meanwhile
            return Waiting(*self.given[0][1:], self._given_since)
        return None

    def ask_gpu(self) -> None:
        """Forget what the GPU has done by now."""
        with _querying:
            if suspended_for():
                return  # a capture may run, in which nobody may ask
            while self.given and self.given[0][0].query():
                self.given.popleft()
                self._given_since = time.monotonic()
            if not self.given:
                self._given_since = time.monotonic()
