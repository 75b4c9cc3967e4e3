"""What ranks tell each other while a call runs, and what follows from it. Nothing here talks to anybody."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeboost.core.errors import RankFailedError

Counts = dict[str, tuple[int, tuple[int, ...]]]
"""Of each kind of operation: how many this rank has begun, and the ranks that do it together."""


@dataclass(frozen=True)
class Failure:
    """Why a call ended on all ranks.

    Attributes:
        rank: the first that failed; None if it cannot be told.
        stage: where it was.
        what: one sentence.
        signal: that killed it.
        traceback: of the exception it raised.
    """

    rank: int | None
    stage: str
    what: str
    signal: str | None = None
    traceback: str = ""

    def error(self) -> RankFailedError:
        """What the other ranks raise."""
        return RankFailedError(
            self.what, rank=self.rank, stage=self.stage, signal=self.signal, traceback=self.traceback
        )


def told_of(rank: int, stage: str, error: BaseException) -> Failure:
    """What the other ranks are told of an exception."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failure(rank, stage, f"rank {rank} raised {type(error).__name__} in {stage!r}", traceback=text)


@dataclass(frozen=True)
class Ended:
    """How one call ended on one rank.

    Attributes:
        call: its number among the calls of the mesh, from 1.
        counts: of operations, since the mesh was made.
        open: transfers that were begun and not waited for.
        time: of the clock on the wall.
        error: what this rank raised by itself; None where it raised nothing, or only because another rank failed.
    """

    call: int = 0
    counts: Counts = field(default_factory=dict)
    open: int = 0
    time: float = 0.0
    error: Failure | None = None


@dataclass(frozen=True)
class Record:
    """What one rank tells of itself, again and again while it is in a call.

    Attributes:
        beat: another number in every record.
        call: number of the call it is in, or of its latest.
        inside: whether it is in that call.
        stage: where the call is.
        busy: what it is busy with, empty if it computes or waits.
        counts: of operations, since the mesh was made.
        waiting: the operations that it waits for, those of one exchange together, by number.
        what: they are.
        ended: its latest call that has ended.
        failure: why the mesh cannot be used any more.
    """

    beat: int = 0
    call: int = 0
    inside: bool = False
    stage: str = "no call yet"
    busy: str = ""
    counts: Counts = field(default_factory=dict)
    waiting: Counts = field(default_factory=dict)
    what: str = ""
    ended: Ended = field(default_factory=Ended)
    failure: Failure | None = None

    def to_bytes(self) -> bytes:
        """As the store keeps it."""
        return json.dumps(self, default=vars).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Record:
        """Read what `to_bytes` wrote."""
        told = json.loads(text)
        ended = told.pop("ended")
        return cls(
            counts=_counts(told.pop("counts")),
            waiting=_counts(told.pop("waiting")),
            failure=_failure(told.pop("failure")),
            ended=Ended(counts=_counts(ended.pop("counts")), error=_failure(ended.pop("error")), **ended),
            **told,
        )

    def has_ended(self, call: int) -> bool:
        """Whether this rank has left the call with this number, one way or the other."""
        return self.ended.call >= call


class Late(NamedTuple):
    """The rank for which the others wait.

    Attributes:
        rank: None where ranks wait for each other in a circle, or all have come and nothing happens.
        what: they wait for.
    """

    rank: int | None
    what: str


def first_error(records: Mapping[int, Record], call: int) -> Failure | None:
    """The first of the exceptions that ended a call."""
    errors = [record.ended for record in records.values() if record.ended.call == call and record.ended.error]
    return min(errors, key=lambda ended: ended.time).error if errors else None


def left_behind(records: Mapping[int, Record], call: int) -> bool:
    """Whether some rank waits for an operation that a rank which has left the call never began."""
    gone = {rank: record.ended for rank, record in records.items() if record.ended.call == call}
    return any(
        member in gone and _begun(gone[member].counts, operation) < number
        for record in records.values()
        if record.inside and record.call == call
        for operation, (number, members) in record.waiting.items()
        for member in members
    )


def in_step(ends: Mapping[int, Ended]) -> bool:
    """Whether ranks that have all left a call have begun the same operations: then the next call can have the groups.

    No message is under way then: every operation that one rank has begun, the others have begun with it.
    """
    return not any(ended.open for ended in ends.values()) and all(
        _begun(ends[member].counts, operation) == number
        for ended in ends.values()
        for operation, (number, members) in ended.counts.items()
        for member in members
    )


def late_for(rank: int, records: Mapping[int, Record]) -> Late:
    """For whom `rank`, which waits, waits in the end: those it waits for may wait themselves."""
    seen: list[int] = []
    what = records[rank].what
    while rank not in seen:
        seen.append(rank)
        record = records[rank]
        missing = [
            member
            for operation, (number, members) in sorted(record.waiting.items())
            for member in members
            if member not in records or _begun(records[member].counts, operation) < number
        ]
        if not missing:
            return Late(None, what)
        idle = [member for member in missing if member not in records or not records[member].waiting]
        if idle:
            return Late(idle[0], what)
        rank = missing[0]
    return Late(None, what)


def _begun(counts: Counts, operation: str) -> int:
    return counts[operation][0] if operation in counts else 0


def _counts(told: Mapping[str, Any]) -> Counts:
    return {operation: (number, tuple(members)) for operation, (number, members) in told.items()}


def _failure(told: Mapping[str, Any] | None) -> Failure | None:
    return None if told is None else Failure(**told)


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Such as `rank 2` or `ranks 0, 1 and 3`."""
    numbers = [str(rank) for rank in sorted(ranks)]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"
