"""The records that ranks exchange while a call runs, and what follows from them. Nothing here communicates."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import NamedTuple

from pipeboost.core.errors import RankFailedError


class Operation(NamedTuple):
    """A kind of operation, and the ranks that do it together."""

    name: str
    members: tuple[int, ...]


Counts = dict[Operation, int]
"""How many of each kind a rank has begun."""


class Failure(NamedTuple):
    """Why a call ended on all ranks.

    Attributes:
        rank: the first that failed; None if it is not known.
        stage: where it was.
        description: one sentence.
        signal: that killed it.
        traceback: of the exception it raised.
    """

    rank: int | None
    stage: str
    description: str
    signal: str | None = None
    traceback: str = ""

    def error(self) -> RankFailedError:
        """Return what the other ranks raise."""
        return RankFailedError(
            self.description, rank=self.rank, stage=self.stage, signal=self.signal, traceback=self.traceback
        )


def failure_from(error: BaseException, rank: int, stage: str) -> Failure:
    """Return what the other ranks learn of an exception."""
    text = "".join(traceback.format_exception(error))
    return Failure(rank, stage, f"rank {rank} raised {type(error).__name__} in {stage!r}", traceback=text)


class Ended(NamedTuple):
    """How one call ended on one rank."""

    call: int = 0  # its number among the calls of the mesh, from 1
    counts: Counts = {}  # noqa: RUF012 - of operations, since the mesh was made; nobody writes to it
    open: int = 0  # transfers that were begun and not waited for
    time: float = 0.0  # of the clock on the wall
    error: Failure | None = None  # what this rank raised by itself, not because another failed


class Record(NamedTuple):
    """The state of one rank, sent again and again while it is in a call."""

    beat: int = 0  # larger in every record
    call: int = 0  # the one it is in, or its latest
    stage: str = "no call yet"
    busy: str = ""  # what suspends its time-out, empty if it computes or waits
    counts: Counts = {}  # noqa: RUF012 - of operations, since the mesh was made
    waiting: Counts = {}  # noqa: RUF012 - the operations that it waits for, by number
    description: str = ""  # of these
    ended: Ended = Ended()  # its latest call that has ended
    failure: Failure | None = None  # why the mesh cannot be used any more

    @property
    def inside(self) -> bool:
        """Whether it is in that call."""
        return not self.has_ended(self.call)

    def has_ended(self, call: int) -> bool:
        """Whether this rank has left the call with this number, one way or the other."""
        return self.ended.call >= call


def first_error(records: Mapping[int, Record], call: int) -> Failure | None:
    """Return the first of the exceptions that ended a call."""
    errors = [record.ended for record in records.values() if record.ended.call == call and record.ended.error]
    return min(errors, key=lambda ended: ended.time).error if errors else None


def in_step(ends: Mapping[int, Ended]) -> bool:
    """Whether ranks that have all left a call have begun the same operations: then the next call can have the groups.

    No message is under way then: every operation that one rank has begun, the others have begun with it.
    """
    return not any(ended.open for ended in ends.values()) and all(
        ends[member].counts.get(operation) == number
        for ended in ends.values()
        for operation, number in ended.counts.items()
        for member in operation.members
    )


def late_rank(rank: int, records: Mapping[int, Record]) -> int | None:
    """Return the rank for which `rank`, which waits, waits in the end: those it waits for may wait themselves.

    One that has left its call counts before one that is on its way. None where ranks wait for each other in a circle,
    or all have come and nothing happens.
    """
    seen: list[int] = []
    while rank not in seen:
        seen.append(rank)
        missing = [
            member
            for operation, number in sorted(records[rank].waiting.items())
            for member in operation.members
            if member not in records or records[member].counts.get(operation, 0) < number
        ]
        left = [member for member in missing if member in records and not records[member].inside]
        idle = left + [member for member in missing if member not in records or not records[member].waiting]
        if idle or not missing:
            return idle[0] if idle else None
        rank = missing[0]
    return None
