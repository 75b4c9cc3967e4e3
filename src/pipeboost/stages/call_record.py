"""`CallRecord`: one call from before it starts until after it has ended, and what is kept of it for its report.

`AdmissionQueue` says in which order the calls of one pipeline start, and how many of them denoise at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from pipeboost.contract.call import Call, Slot, assigned
from pipeboost.core.errors import Cancelled
from pipeboost.stages.report import Report, report_maker
from pipeboost.stages.spans import RECORDER, Progress

AT_ONCE = 2
"""Calls in their loops at a time: the kernels of one fill the gaps between those of the other."""
_given: ContextVar[CallRecord | None] = ContextVar("pipeboost_call_record", default=None)


class AdmissionQueue:
    """The calls of one pipeline that wait or run, in the order in which they came."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self.changed = threading.Condition()

    def enter(self, record: CallRecord, *, alone: bool, must_run: bool = False) -> None:
        """Queue a call, which is to run inside `record.admitted()`.

        Args:
            alone: the call starts once all before it have left, and those after it once it has left; otherwise what
                comes before and after their loops overlaps.
            must_run: the call starts even when it is cancelled, since other ranks make it too.
        """
        record.queue, record.alone, record.must_run = self, alone, must_run
        with self.changed:
            self.records.append(record)


@dataclass(eq=False)
class CallRecord:
    """The state of one call that others than its own thread ask for.

    Attributes:
        kept: whether somebody else has it, so that the pipeline's own report is not of this call.
        listeners: called at each stage and denoising step; what they raise ends the call.
        progress: what they were called with last.
        call: the call while it runs.
        cancelled: whether it is to be.
        finished: makes its report from what is of the pipeline, once it has ended.
        queue: in which it has a place; None where it has none.
        alone, must_run: as given to `AdmissionQueue.enter`.
        begun, ended: whether its loop has.
    """

    kept: bool = False
    listeners: list[Callable[[Progress], None]] = field(default_factory=list)
    progress: Progress | None = None
    call: Call | None = None
    cancelled: bool = False
    finished: Callable[..., Report] | None = None
    queue: AdmissionQueue | None = None
    alone: bool = True
    must_run: bool = False
    begun: bool = False
    ended: bool = False

    def note(self, progress: Progress) -> None:
        """Note where the call is, and call the listeners."""
        self.progress = progress
        for listener in tuple(self.listeners):
            listener(progress)

    @contextlib.contextmanager
    def following(self, call: Call) -> Iterator[None]:
        """Inside, the call runs; afterwards what a report needs of it is kept."""
        self.call = call
        if self.cancelled:  # while it waited
            call.cancel()
        try:
            yield
        finally:
            self.call = None
            call.pop(RECORDER)  # which knows its call: without this cycle a dropped pipeline frees its memory at once
            if call.events:
                self.finished = report_maker(call)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Wait until the call may start; inside, it has its place in the queue, which it then gives up.

        Raises:
            Cancelled: it was cancelled meanwhile.
        """
        try:
            if self.alone:
                self._wait(lambda before: not before)
            else:
                self._wait(lambda before: all(each.begun and not each.alone for each in before))
            yield
        finally:
            assert self.queue is not None
            with self.queue.changed:
                self.queue.records.remove(self)
                self.queue.changed.notify_all()

    def begin(self) -> None:
        """Wait until few enough of the calls before this one still denoise.

        Raises:
            Cancelled: it was cancelled meanwhile.
        """
        self._wait(lambda before: sum(not each.ended for each in before) < AT_ONCE)
        self.begun = True
        self._notify()

    def end(self) -> None:
        """Let the next call denoise; harmless when repeated."""
        self.begun = self.ended = True
        self._notify()

    def cancel(self) -> None:
        """Make the call raise `Cancelled` where it waits to start, or at its next denoising step."""
        self.cancelled = True
        self._notify()
        if (call := self.call) is not None:  # which another thread may set to None
            call.cancel()

    def _notify(self) -> None:
        if self.queue is not None:
            with self.queue.changed:
                self.queue.changed.notify_all()

    def _wait(self, ready: Callable[[Sequence[CallRecord]], bool]) -> None:
        queue = self.queue
        assert queue is not None
        with queue.changed:
            queue.changed.wait_for(
                lambda: (self.cancelled and not self.must_run) or ready(queue.records[: queue.records.index(self)])
            )
            if self.cancelled and not self.must_run:
                raise Cancelled("the call was cancelled while it waited for its turn")


ADMISSION = Slot[CallRecord]()
"""The record of a call that overlaps with others."""


def recorded_by(record: CallRecord) -> contextlib.AbstractContextManager[None]:
    """Inside, the next call of this thread has this record, which is kept."""
    return assigned(_given, record)


def take_record() -> CallRecord:
    """Return the record for a call that begins; calls inside it get their own."""
    record = _given.get()
    if record is None:
        return CallRecord()
    _given.set(None)
    return record
