"""`CallRecord`: one call from before it starts until after it has ended, and what is kept of it for its report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from pipeboost.contract.call import Call, assigned
from pipeboost.stages.admission import Admission
from pipeboost.stages.report import FinishedCall
from pipeboost.stages.spans import RECORDER, Progress

_given: ContextVar[CallRecord | None] = ContextVar("pipeboost_call_record", default=None)


@dataclass(eq=False)
class CallRecord:
    """The state of one call that others than its own thread ask for.

    Attributes:
        kept: whether somebody else has it, so that the pipeline's own report is not of this call.
        admission: its place among the calls of its pipeline; None where it has none.
        listeners: called at each stage and denoising step; what they raise ends the call.
        progress: what they were called with last.
        call: the call while it runs.
        cancelled: whether it is to be.
        finished: what a report needs of the call, once it has ended.
    """

    kept: bool = False
    admission: Admission | None = None
    listeners: list[Callable[[Progress], None]] = field(default_factory=list)
    progress: Progress | None = None
    call: Call | None = None
    cancelled: bool = False
    finished: FinishedCall | None = None

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
                self.finished = FinishedCall.of(call)

    def cancel(self) -> None:
        """Make the call raise `Cancelled` where it waits to start, or at its next denoising step."""
        self.cancelled = True
        if self.admission is not None:
            self.admission.cancel()
        if (call := self.call) is not None:  # which another thread may set to None
            call.cancel()


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
