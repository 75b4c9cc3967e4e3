"""`Monitor`: judges, from what the ranks tell during a call, whether one of them has failed."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pipeboost.distributed.failure.collective_wait import Operations
from pipeboost.distributed.failure.heartbeat import Heartbeat
from pipeboost.distributed.failure.local_processes import Death
from pipeboost.distributed.failure.records import Failure, Record, describe_ranks, first_error, late_rank, left_behind

_LAST_WORDS = 0.05
"""Seconds in which what a dead rank has sent is there to be read."""


class Monitor:
    """Judges one call, a look every `pause` seconds; ranks may wait or give no sign of life for `patience` seconds."""

    def __init__(self, heartbeat: Heartbeat, operations: Operations, call: int, patience: float, pause: float) -> None:
        self._heartbeat = heartbeat
        self._operations = operations
        self._call = call
        self._patience = patience
        self._pause = pause
        self._deaths: dict[int, Death] = {}
        self._looked = self._awake = self._excused = time.monotonic()

    def failure(self, own: Record) -> Failure | None:
        """Return why the call has failed; None while it has not. Asked again and again, with the latest record."""
        now = time.monotonic()
        if now - self._looked > self._pause + 1.0:
            self._awake = now  # this process stood still, so it has heard nothing
        self._looked = now
        self._look_for_deaths()
        others = self._heartbeat.records.copy()
        records = {**others, self._heartbeat.rank: own}
        told = next((each.failure for each in others.values() if each.failure), None)
        if told is None and left_behind(records, self._call):
            told = first_error(records, self._call)
        return told or self._dead(others) or self._silent(others, now) or self._stalled(records, now)

    def _look_for_deaths(self) -> None:
        neighbours = self._heartbeat.neighbours
        for rank in sorted(self._heartbeat.gone - self._deaths.keys()):
            # The system tells of what a process of this machine dies, soon after its connections have ended.
            death = neighbours[rank].death() if rank in neighbours else Death("has gone: its connection broke", None)
            if death is not None:
                self._deaths[rank] = death
                time.sleep(_LAST_WORDS)
                self._heartbeat.receive()

    def _dead(self, others: Mapping[int, Record]) -> Failure | None:
        for rank, death in self._deaths.items():
            record = others[rank]
            if not record.has_ended(self._call):
                error = record.ended.error
                if error is not None and not record.inside:
                    return error._replace(description=f"{error.description}, and {death.how}")
                return Failure(rank, record.stage, f"rank {rank} {death.how} in {record.stage!r}", death.signal)
        return None

    def _silent(self, others: Mapping[int, Record], now: float) -> Failure | None:
        """Whether a rank in the call gives no sign of life, whatever it said last that it was busy with."""
        for rank, record in others.items():
            silence = now - max(self._heartbeat.heard[rank], self._awake)
            if record.inside and record.call == self._call and silence > self._patience:
                how = f"rank {rank} has given no sign of life for {self._patience:g} s"
                return Failure(rank, record.stage, f"{how}; it was last in {record.stage!r}")
        return None

    def _stalled(self, records: Mapping[int, Record], now: float) -> Failure | None:
        here = self._heartbeat.rank
        for rank, record in records.items():
            # One that has left the call says nothing any more, so that what it said last excuses it for a while only.
            if record.busy and (rank == here or now - self._heartbeat.heard[rank] < self._patience):
                self._excused = now
        waiting = self._operations.waiting()
        if waiting is None or now - max(waiting.since, self._awake, self._excused) < self._patience:
            return None
        members = {rank for _, ranks in waiting.operations.values() for rank in ranks}
        what = f"{waiting.description} of {describe_ranks(members)}"
        late = late_rank(here, records)
        if late is None:
            doing = "; ".join(f"rank {rank}: {each.description}" for rank, each in records.items() if each.waiting)
            description = f"{what} has not ended for {self._patience:g} s, and no rank is late ({doing})"
            return Failure(None, records[here].stage, description)
        description = (
            f"rank {late} has not come to {what} for {self._patience:g} s, and no rank loads, compiles or captures; it "
            f"is in {records[late].stage!r}; if it needs longer, raise ParallelConfig(timeout=...)"
        )
        return Failure(late, records[late].stage, description)
