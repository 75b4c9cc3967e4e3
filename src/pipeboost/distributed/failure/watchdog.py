"""`Watchdog`: the guard around every call on several ranks. No rank waits for ever, and all learn why a call ended.

Each rank sends the others records of where it is (by a `Heartbeat`), and a thread on each judges them. It ends the call
where a rank raised and another waits for it, where a rank's process dies, where one gives no sign of life, and where
ranks wait too long. To end a call it breaks the groups, which wakes whoever waits in them, and makes this rank raise
`RankFailedError` at its next step; a rank that does not come ends its process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.failure.collective_wait import Operations, Waiting, suspended_for
from pipeboost.distributed.failure.heartbeat import Heartbeat
from pipeboost.distributed.failure.records import Ended, Failure, Record, failure_from, first_error, in_step, late_rank
from pipeboost.distributed.local_processes import Death

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group


class Watchdog:
    """The calls of one mesh, one at a time; the ranks of `control`, which share a sample, make it at once."""

    def __init__(self, control: Group, groups: Sequence[Group], device: torch.device) -> None:
        self._admission = threading.RLock()  # held by the thread whose call it is
        self._heartbeat = Heartbeat(control)
        self._rank, self._device = self._heartbeat.rank, device
        self._others = [rank for rank in control.ranks if rank != self._rank]
        self._groups = [each for each in groups if each.size > 1 and set(control.ranks).issuperset(each.ranks)]
        self._operations = Operations(self.check)
        for group in self._groups:
            group.operations = self._operations
        self._stage = ""
        self._call = 0
        self._ended = Ended()
        self._failure: Failure | None = None  # why the mesh cannot be used any more
        self._failing, self._failed = threading.Lock(), threading.Event()
        self._latest: Any = None

    @contextlib.contextmanager
    def watched(self, stage: str, *, timeout: float) -> Iterator[None]:
        """Inside, the ranks that share a sample run one call together; every rank enters this for every call.

        An exception on one rank ends the call on all of them: that rank raises it, the others `RankFailedError`. Where
        all raise at the same point, each raises its own, and the next call can have the groups; so it is wherever all
        ranks have come equally far. Calls on one mesh run one at a time; one inside another is part of it.

        Args:
            stage: where the call begins.
            timeout: seconds that ranks may wait in one operation while none loads, compiles or captures
                (`suspend_timeout`), and that a rank may give no sign of life.

        Raises:
            RankFailedError: another rank has failed, or does not come.
            PipeboostError: the ranks are out of step since an earlier call.
        """
        if not self._others:
            yield
            return
        with self._admission:
            if self._inside:
                yield
                return
            calls = self._call
            try:
                self._enter(stage, timeout)
                yield
            except BaseException as error:
                if self._call > calls:
                    self._leave(error)
                raise
            self._leave(None)

    @property
    def _inside(self) -> bool:
        return self._call > self._ended.call

    def _enter(self, stage: str, timeout: float) -> None:
        if self._failure is not None:
            raise PipeboostError(
                "the ranks of this pipeline are out of step since an earlier call failed "
                f"({self._failure.description}); start the ranks again, or where all live call accelerate_pipeline "
                "again on every one"
            )
        if self._latest is not None:
            # Ranks write into each other's memory in the order of the calls, whatever stream each is on.
            torch.cuda.current_stream(self._device).wait_event(self._latest)
        self._stage, self._timeout = stage, timeout
        self._pause = min(max(timeout / 60, 0.05), 0.5)  # seconds between two signs of life
        self._looked = self._awake = self._excused = time.monotonic()
        woken, self._wake = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, args=(woken,), name="pipeboost watch", daemon=True)
        self._call += 1
        self._heartbeat.exchange(self._record)
        self._thread.start()

    def _leave(self, error: BaseException | None) -> None:
        """End the call, which has raised `error` here: raise what another rank's failure makes this one raise."""
        try:
            if self._device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a GPU that has failed, which the call raises
                    self._latest = torch.cuda.current_stream(self._device).record_event()
            if error is not None and _of_transport(error) and not self._failed.wait(min(5.0, self._timeout / 2)):
                # A connection broke, but whoever broke it, not this rank, has failed.
                text = f"the connection to another rank broke in {self._stage!r}: {error}"
                self._fail(Failure(None, self._stage, text))
            own = None
            if error is not None and self._failure is None:
                own = failure_from(error, self._rank, self._stage)
            counts, pending = dict(self._operations.counts), len(self._operations.open)
            self._ended = Ended(self._call, counts, pending, time.time(), own)
            self._heartbeat.exchange(self._record)
            failed = error is not None or first_error(self._records(), self._call) is not None
            if not failed:
                self._stop()  # nothing is left to judge
            if failed or self._failure is not None:
                self._compare(patience=self._timeout / 3 if isinstance(error, Exception | None) else 2.0)
                reason = self._failure or first_error(self._records(), self._call)
                if own is None and reason is not None:
                    raise reason.error() from error
        finally:
            self._ended = self._ended._replace(call=self._call)  # Ctrl-C may have come first
            self._stop()

    def _stop(self) -> None:
        self._wake.close()
        if self._thread.ident is not None:  # Ctrl-C may have come before it was started
            self._thread.join()

    def check(self) -> None:
        """Raise `RankFailedError` if another rank has failed; cheap, for places that a call passes often."""
        if self._failure is not None:
            raise self._failure.error()

    def enter_stage(self, stage: str) -> None:
        """Let the other ranks know at once that a stage has begun; a failure is put down to the latest one."""
        if self._inside:
            self._stage = stage
            self._heartbeat.exchange(self._record)

    def close(self) -> None:
        """Give up the connections to the other ranks."""
        self._heartbeat.close()

    def _records(self) -> dict[int, Record]:
        return {**self._heartbeat.records, self._rank: self._record()}

    def _record(self) -> Record:
        waiting = self._operations.waiting() or Waiting({}, "", 0.0)
        return Record(
            beat=time.monotonic_ns(),
            call=self._call,
            stage=self._stage if self._inside else "between calls",
            busy=suspended_for(),
            counts=dict(self._operations.counts),
            waiting=waiting.operations,
            description=waiting.description,
            ended=self._ended,
            failure=self._failure,
        )

    def _run(self, woken: Connection) -> None:
        ends = float("inf")
        try:
            while not self._heartbeat.wait(self._pause, woken):
                self._heartbeat.exchange(self._record, deaths=True)
                if self._failure is None:
                    self._operations.ask_gpu()
                    self._fail(self._judge())
                elif self._inside:
                    ends = min(ends, time.monotonic() + min(5.0, self._timeout / 2))
                    if time.monotonic() > ends:
                        _end_process(self._rank, self._failure)
        except Exception:
            description = f"rank {self._rank} cannot watch the others any more in {self._stage!r}"
            self._fail(Failure(self._rank, self._stage, description, traceback=traceback.format_exc()))
        woken.close()

    def _judge(self) -> Failure | None:
        """Return why the call has failed, as the records of the ranks show; None while it has not."""
        now = time.monotonic()
        if now - self._looked > self._pause + 1.0:
            self._awake = now  # this process stood still, so it has received nothing
        self._looked = now
        deaths, records = self._heartbeat.deaths.copy(), self._records()  # what a rank sent last is there first
        known = next((record.failure for record in records.values() if record.failure), None)
        late = late_rank(self._rank, records)
        if known is None and late is not None and late in records and records[late].has_ended(self._call):
            known = first_error(records, self._call)  # it never began what this rank waits for
        return known or self._dead(deaths, records) or self._silent(records, now) or self._stalled(records, late, now)

    def _dead(self, deaths: Mapping[int, Death], records: Mapping[int, Record]) -> Failure | None:
        for rank, death in deaths.items():
            record = records[rank]
            if not record.has_ended(self._call):
                error = record.ended.error
                if error is not None and not record.inside:
                    return error._replace(description=f"{error.description}, and {death.how}")
                return Failure(rank, record.stage, f"rank {rank} {death.how} in {record.stage!r}", death.signal)
        return None

    def _silent(self, records: Mapping[int, Record], now: float) -> Failure | None:
        """Whether a rank in the call gives no sign of life, whatever it was busy with last."""
        received = {self._rank: now, **self._heartbeat.received}
        for rank, record in records.items():
            # One that has left the call sends no more records, so that its last one excuses it for a while only.
            if record.busy and now - received[rank] < self._timeout:
                self._excused = now
            silence = now - max(received[rank], self._awake)
            if record.inside and record.call == self._call and silence > self._timeout:
                how = f"rank {rank} has given no sign of life for {self._timeout:g} s"
                return Failure(rank, record.stage, f"{how}; it was last in {record.stage!r}")
        return None

    def _stalled(self, records: Mapping[int, Record], late: int | None, now: float) -> Failure | None:
        waiting = self._operations.waiting()
        if waiting is None or now - max(waiting.since, self._awake, self._excused) < self._timeout:
            return None
        members = sorted({rank for operation in waiting.operations for rank in operation.members})
        what = f"{waiting.description} of ranks {', '.join(map(str, members))}"
        if late is None:
            doing = "; ".join(f"rank {rank}: {each.description}" for rank, each in records.items() if each.waiting)
            text = f"{what} has not ended for {self._timeout:g} s, and no rank is late ({doing})"
            return Failure(None, records[self._rank].stage, text)
        text = (
            f"rank {late} has not come to {what} for {self._timeout:g} s, and no rank loads, compiles or captures; it "
            f"is in {records[late].stage!r}; if it needs longer, raise ParallelConfig(timeout=...)"
        )
        return Failure(late, records[late].stage, text)

    def _fail(self, failure: Failure | None) -> None:
        """End the call on all ranks, and wake whoever waits. The first failure counts."""
        with self._failing:
            if failure is None or self._failure is not None:
                return
            self._failure = failure
        self._failed.set()
        self._heartbeat.exchange(self._record)
        for group in self._groups:
            group.abort()

    def _compare(self, patience: float) -> None:
        """The call has failed here or elsewhere: find out whether the ranks are in step, and let all know if not."""
        until = time.monotonic() + patience
        while self._failure is None and time.monotonic() < until:
            records = self._records()
            if all(rank in records and records[rank].has_ended(self._call) for rank in self._others):
                if in_step({rank: record.ended for rank, record in records.items()}):
                    return
                break
            self._failed.wait(0.01)
        self._fail(first_error(self._records(), self._call) or Failure(None, "", "the ranks are out of step"))


def _end_process(rank: int, failure: Failure) -> None:
    """End this rank, which does not leave its call by itself, after saying why and where it stands."""
    out = sys.__stderr__
    if out is not None:
        print(f"pipeboost: rank {rank} ends, because it does not leave its call: {failure.error()}", file=out)
        faulthandler.dump_traceback(file=out)
        out.flush()
    os._exit(1)


def _of_transport(error: BaseException | None) -> bool:
    """Whether an exception is a backend's, or came of one: then it is about another rank rather than this one."""
    if error is None:
        return False
    of_gloo = isinstance(error, RuntimeError) and any(each in str(error) for each in ("gloo", "pair closure"))
    return of_gloo or isinstance(error, dist.DistError) or _of_transport(error.__cause__ or error.__context__)
