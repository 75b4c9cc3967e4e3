"""`Watch`: what is kept of one mesh from call to call; it begins calls, ends them, and knows why one has failed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.collectives.collective_wait import busy_with, waited_for_by
from pipeboost.distributed.collectives.mesh import Mesh
from pipeboost.distributed.failure.abort import break_off
from pipeboost.distributed.failure.heartbeat import Mail, nothing_to_do
from pipeboost.distributed.failure.monitor import Guard
from pipeboost.distributed.failure.progress import Progress
from pipeboost.distributed.failure.records import Ended, Failure, Record, first_error, in_step, told_of
from pipeboost.distributed.start import world

_PAUSES = (0.05, 0.5)
"""Seconds between two looks: the timeout by 60, but in these bounds."""


class Watch:
    """One mesh and the calls it runs, one at a time.

    Attributes:
        turn: held by the thread whose call it is.
        rank: of this process in the world.
        others: ranks of the mesh that share its sample.
        neighbours: the processes of those on this machine.
        progress: of this rank.
        mail: between this rank and the others.
        call: number of the call that runs, or of the latest.
        inside: whether it runs.
        timeout: of that call, in seconds.
        failure: why the mesh cannot be used any more.
    """

    def __init__(self, mesh: Mesh) -> None:
        control = mesh.control
        self.turn = threading.RLock()
        self.inside = False
        self.rank = control.ranks[control.rank]
        self.others = tuple(rank for rank in control.ranks if rank != self.rank)
        self._groups = [group for group in mesh.groups if group.size > 1 and set(group.ranks) <= set(control.ranks)]
        self.neighbours = mesh.neighbours
        self.mail = Mail(world().store, control.name, self.rank, self.others, self._record, _PAUSES[1])
        self.timeout = 0.0
        self._stage: Callable[[], str] = str
        self.call = 0
        self.progress = Progress(self.check, self._find_out)
        self._told = ""
        self._ended = Ended()
        self.failure: Failure | None = None
        self._failed = threading.Event()
        self._failing = threading.Lock()
        self._device = mesh.device
        self._latest: Any = None

    def enter(self, stage: Callable[[], str], timeout: float) -> None:
        """Begin a call."""
        self._require_usable()
        if self._latest is not None:
            # Ranks write into each other's memory in the order of the calls, whatever stream each is on.
            torch.cuda.current_stream(self._device).wait_event(self._latest)
        self._stage = stage
        self.timeout = timeout
        self.call += 1
        self._told = ""
        self.mail.pause = min(max(timeout / 60, _PAUSES[0]), _PAUSES[1])
        self.inside = True
        self._resources = contextlib.ExitStack()
        self._guard = Guard(self)
        self._resources.callback(self._guard.stop)
        self._resources.callback(self.mail.stop)
        self._resources.enter_context(waited_for_by(self.progress, [group.name for group in self._groups]))
        self.mail.on_news = self._guard.wake
        self.mail.send()
        self.mail.start()
        self._guard.start()

    def leave(self, error: BaseException | None) -> None:
        """End the call: raise what another rank's failure makes this one raise, or return where its own counts.

        Args:
            error: what the call has raised here.
        """
        try:
            if self._device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a GPU that has failed, which the call raises
                    self._latest = torch.cuda.current_stream(self._device).record_event()
            if error is not None and self.failure is None and _of_transport(error):
                self._find_out(error)
            own = error is not None and self.failure is None
            # What the call had opened is closed by now, so it cannot tell any more where it was.
            told = told_of(self.rank, self._told or self.where(), error) if own and error is not None else None
            self._ended = Ended(self.call, dict(self.progress.counts), self.progress.open, time.time(), told)
            self.inside = False
            if error is None:
                self.mail.on_news = (
                    nothing_to_do  # the guard has nothing left to judge, unless there is an error elsewhere
                )
            self.mail.exchange()
            if error is not None or self.failure is not None or first_error(self.records(), self.call):
                self._compare(patience=self.timeout / 3 if isinstance(error, Exception | None) else 2.0)
                reason = self.failure or first_error(self.records(), self.call)
                if not own and reason is not None:
                    raise reason.error() from error
        finally:
            self.inside = False
            self._resources.close()

    def check(self) -> None:
        """Raise if the call has failed elsewhere."""
        if self.failure is not None:
            raise self.failure.error()

    def tell(self) -> None:
        """Send a record at once."""
        if self.inside:
            self._told = self.where()
            self.mail.send()

    def records(self) -> dict[int, Record]:
        """What is known of all ranks of the mesh, this one among them."""
        return {**self.mail.records, self.rank: self._record()}

    def _record(self) -> Record:
        waiting = self.progress.waiting()
        return Record(
            beat=time.monotonic_ns(),
            call=self.call,
            inside=self.inside,
            stage=self.where(),
            busy=busy_with(),
            counts=dict(self.progress.counts),
            waiting=self.progress.operations(),
            what="" if waiting is None else waiting.what,
            ended=self._ended,
            failure=self.failure,
        )

    def where(self) -> str:
        """The stage that the call is in."""
        try:
            return self._stage() if self.inside else "between calls"
        except Exception as error:
            return f"a stage that cannot be told ({error})"

    def fail(self, failure: Failure) -> None:
        """The call has failed: tell it, and wake whoever waits. The first failure counts."""
        with self._failing:
            if self.failure is not None:
                return
            self.failure = failure
        self._failed.set()
        self.mail.hurry()
        for group in self._groups:
            break_off(group)

    def _find_out(self, error: BaseException) -> None:
        """A connection broke: whoever broke it has failed, not this rank. Sets the failure."""
        self.mail.hurry()
        self._guard.wake()
        if self._failed.wait(min(5.0, self.timeout / 2)):
            return
        # Nobody said anything, and no process of this machine has died: a rank of another machine has gone.
        since = time.monotonic() - 4 * self.mail.pause
        silent = [rank for rank in self.others if self.mail.heard.get(rank, 0.0) < since]
        records = self.records()
        if self.mail.lost is None and len(silent) == 1 and silent[0] in records:
            rank, stage = silent[0], records[silent[0]].stage
            what = f"rank {rank} has gone: a connection broke and it gives no sign of life; it was last in {stage!r}"
            self.fail(Failure(rank, stage, what))
        else:
            where = self.where()
            self.fail(Failure(None, where, f"the connection to another rank broke in {where!r}: {error}"))

    def _compare(self, patience: float) -> None:
        """The call has failed here or elsewhere: find out whether the ranks are in step, and let all know if not."""
        self.mail.on_news = self._guard.wake
        until = time.monotonic() + patience
        while self.failure is None:
            records = self.records()
            if all(rank in records and records[rank].has_ended(self.call) for rank in self.others):
                if in_step({rank: record.ended for rank, record in records.items()}):
                    return
                break
            if time.monotonic() > until:
                break
            self._failed.wait(0.01)
            self.mail.exchange()
        self.fail(first_error(self.records(), self.call) or Failure(None, "", "the ranks are out of step"))
        # This process may end now, and the store with it: the others must have heard, though one may be past hearing.
        late = min(5.0, self.timeout)
        until = time.monotonic()
        while unaware := [rank for rank in self.others if not self._knows(rank)]:
            failed = self.failure is not None and unaware == [self.failure.rank]
            if time.monotonic() > until + (min(1.0, late) if failed else late):
                break
            time.sleep(0.01)
            self.mail.exchange()

    def _knows(self, rank: int) -> bool:
        record = self.mail.records.get(rank)
        gone = rank in self._guard.deaths or self.mail.lost is not None
        return gone or record is None or record.failure is not None or record.has_ended(self.call)

    def _require_usable(self) -> None:
        if self.failure is not None:
            raise PipeboostError(
                f"the ranks of this pipeline are out of step since an earlier call failed ({self.failure.what}); "
                "start the ranks again, or where all live call accelerate_pipeline again on every one"
            )


def _of_transport(error: BaseException) -> bool:
    """Whether an exception is a backend's, which tells of another rank rather than of this one."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "pair closure" in text)
    )
