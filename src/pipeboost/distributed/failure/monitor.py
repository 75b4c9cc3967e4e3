"""`Guard`: the thread that judges what the ranks tell while a call runs."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
import traceback
from typing import TYPE_CHECKING

from pipeboost.distributed.failure.abort import end_process
from pipeboost.distributed.failure.heartbeat import nothing_to_do
from pipeboost.distributed.failure.local_processes import Death
from pipeboost.distributed.failure.records import Failure, Record, first_error, late_for, left_behind, ranks_in_words

if TYPE_CHECKING:
    from pipeboost.distributed.failure.watchdog import Watch


class Guard:
    """The thread that judges what the ranks tell, for the length of one call."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.deaths: dict[int, Death] = {}
        self._patience = watch.timeout
        self._looked = self._excused = time.monotonic()
        self._stopping = False
        self._ends: float | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._read, selectors.EVENT_READ)
        self._may_be_dead: set[int] = set()
        for rank, neighbour in watch.neighbours.items():
            if neighbour.descriptor is not None:
                self._selector.register(neighbour.descriptor, selectors.EVENT_READ, rank)
            else:
                self._may_be_dead.add(rank)
        self._thread = threading.Thread(target=self._run, name="pipeboost watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wake(self) -> None:
        """Look now."""
        with contextlib.suppress(BlockingIOError):  # it is awake
            os.write(self._write, b".")

    def stop(self) -> None:
        """Stop looking."""
        self._stopping = True
        self.wake()
        self._thread.join()
        self._watch.mail.on_news = nothing_to_do
        self._selector.close()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._watch.mail.pause):
                    if key.data is None:
                        os.read(self._read, 4096)
                    else:
                        self._may_be_dead.add(key.data)
                        self._selector.unregister(key.fd)  # it stays readable
                self._look()
        except Exception:
            where = self._watch.where()
            what = f"rank {self._watch.rank} cannot watch the others any more in {where!r}"
            self._watch.fail(Failure(self._watch.rank, where, what, traceback=traceback.format_exc()))

    def _look(self) -> None:
        watch = self._watch
        now = time.monotonic()
        if now - self._looked > watch.mail.pause + 1.0:
            self._excused = now  # this process stood still, so it has heard nothing
        self._looked = now
        if watch.failure is None:
            watch.progress.ask_gpu()
            failure = self._judge(now)
            if failure is not None:
                watch.fail(failure)
        if watch.failure is not None and watch.inside:
            if self._ends is None:
                self._ends = now + min(5.0, self._patience / 2)
            elif now > self._ends:
                end_process(watch.rank, watch.failure)

    def _judge(self, now: float) -> Failure | None:
        watch = self._watch
        records = watch.records()
        told = [records[rank].failure for rank in watch.others if rank in records]
        for failure in told:
            if failure is not None:
                return failure
        if left_behind(records, watch.call):
            failure = first_error(records, watch.call)
            if failure is not None:
                return failure
        return self._dead() or self._silent(records, now) or self._stalled(records, now)

    def _dead(self) -> Failure | None:
        watch = self._watch
        for rank in sorted(self._may_be_dead):
            if rank not in self.deaths:
                death = watch.neighbours[rank].death()
                if death is None:
                    continue
                self.deaths[rank] = death
                watch.mail.exchange(1.0)  # what it said last
            record = watch.mail.records.get(rank, self._silence())
            if record.failure is not None:
                return record.failure
            if not record.has_ended(watch.call):
                death = self.deaths[rank]
                error = record.ended.error
                if error is not None and not record.inside:
                    return Failure(rank, error.stage, f"{error.what}, and {death.how}", traceback=error.traceback)
                return Failure(rank, record.stage, f"rank {rank} {death.how} in {record.stage!r}", death.signal)
        return None

    def _silence(self) -> Record:
        """What is known of a rank that has said nothing."""
        return Record() if self._watch.mail.lost is None else Record(stage="a stage it could not tell")

    def _silent(self, records: dict[int, Record], now: float) -> Failure | None:
        watch = self._watch
        silent = [
            rank
            for rank in watch.others
            if rank in records
            and records[rank].inside
            and records[rank].call == watch.call
            and now - max(watch.mail.heard[rank], self._excused) > self._patience
        ]
        if not silent:
            return None
        stopped = [rank for rank in silent if rank in watch.neighbours and watch.neighbours[rank].is_stopped()]
        if not stopped and now - watch.mail.answered > self._patience / 2:
            what = f"the store where the ranks meet has not answered for {self._patience:g} s"
            return Failure(None, watch.where(), what)
        rank = (stopped or silent)[0]
        stage = records[rank].stage
        what = f"rank {rank} has given no sign of life for {self._patience:g} s; it was last in {stage!r}"
        return Failure(rank, stage, what)

    def _stalled(self, records: dict[int, Record], now: float) -> Failure | None:
        if any(record.busy for record in records.values()):
            self._excused = now
        waiting = self._watch.progress.waiting()
        if waiting is None or now - max(waiting.since, self._excused) < self._patience:
            return None
        late = late_for(self._watch.rank, records)
        members = ranks_in_words({rank for _, ranks in waiting.operations.values() for rank in ranks})
        if late.rank is None:
            doing = "; ".join(f"rank {rank}: {record.what}" for rank, record in sorted(records.items()) if record.what)
            what = f"{waiting.what} of {members} has not ended for {self._patience:g} s, and no rank is late ({doing})"
            return Failure(None, self._watch.where(), what)
        stage = records.get(late.rank, self._silence()).stage
        what = (
            f"rank {late.rank} has not come to {waiting.what} of {members} for {self._patience:g} s, and no rank "
            f"loads, compiles or captures; it is in {stage!r}; if it needs longer, raise ParallelConfig(timeout=...)"
        )
        return Failure(late.rank, stage, what)
