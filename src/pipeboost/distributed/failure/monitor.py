"""`Monitor`: judges, from the records of the ranks during a call, whether one of them has failed."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pipeboost.distributed.failure.collective_wait import Operations
from pipeboost.distributed.failure.heartbeat import Heartbeat
from pipeboost.distributed.failure.records import Failure, Record, describe_ranks, first_error, late_rank


class Monitor:
    """Judges one call, a look every `pause` seconds; ranks may wait or give no sign of life for `patience` seconds."""

    def __init__(self, heartbeat: Heartbeat, operations: Operations, call: int, patience: float, pause: float) -> None:
        self._heartbeat, self._operations, self._call = heartbeat, operations, call
        self._patience, self._pause = patience, pause
        self._looked = self._awake = self._excused = time.monotonic()

    def failure(self, own: Record) -> Failure | None:
        """Return why the call has failed; None while it has not. Asked again and again, with the latest record."""
        now = time.monotonic()
        if now - self._looked > self._pause + 1.0:
            self._awake = now  # this process stood still, so it has received nothing
        self._looked = now
        dead, others = self._dead(), self._heartbeat.records.copy()
        records = {**others, self._heartbeat.rank: own}
        known = next((each.failure for each in others.values() if each.failure), None)
        late = late_rank(self._heartbeat.rank, records)
        if known is None and late is not None and late in records and records[late].has_ended(self._call):
            known = first_error(records, self._call)  # it never began what this rank waits for
        return known or dead or self._silent(others, now) or self._stalled(records, late, now)

    def _dead(self) -> Failure | None:
        for rank, death in self._heartbeat.deaths.copy().items():
            record = self._heartbeat.records[rank]
            if not record.has_ended(self._call):
                error = record.ended.error
                if error is not None and not record.inside:
                    return error._replace(description=f"{error.description}, and {death.how}")
                return Failure(rank, record.stage, f"rank {rank} {death.how} in {record.stage!r}", death.signal)
        return None

    def _silent(self, others: Mapping[int, Record], now: float) -> Failure | None:
        """Whether a rank in the call gives no sign of life, whatever it was busy with last."""
        for rank, record in others.items():
            silence = now - max(self._heartbeat.received[rank], self._awake)
            if record.inside and record.call == self._call and silence > self._patience:
                how = f"rank {rank} has given no sign of life for {self._patience:g} s"
                return Failure(rank, record.stage, f"{how}; it was last in {record.stage!r}")
        return None

    def _stalled(self, records: Mapping[int, Record], late: int | None, now: float) -> Failure | None:
        here = self._heartbeat.rank
        for rank, record in records.items():
            # One that has left the call sends no more records, so that its last one excuses it for a while only.
            if record.busy and (rank == here or now - self._heartbeat.received[rank] < self._patience):
                self._excused = now
        waiting = self._operations.waiting()
        if waiting is None or now - max(waiting.since, self._awake, self._excused) < self._patience:
            return None
        members = {rank for _, ranks in waiting.operations.values() for rank in ranks}
        what = f"{waiting.description} of {describe_ranks(members)}"
        if late is None:
            doing = "; ".join(f"rank {rank}: {each.description}" for rank, each in records.items() if each.waiting)
            description = f"{what} has not ended for {self._patience:g} s, and no rank is late ({doing})"
            return Failure(None, records[here].stage, description)
        description = (
            f"rank {late} has not come to {what} for {self._patience:g} s, and no rank loads, compiles or captures; it "
            f"is in {records[late].stage!r}; if it needs longer, raise ParallelConfig(timeout=...)"
        )
        return Failure(late, records[late].stage, description)
