"""Admission: in which order the calls of one pipeline start, and how many of them denoise at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pipeboost.contract.call import Slot
from pipeboost.core.errors import Cancelled

AT_ONCE = 2
"""Calls in their loops at a time: the kernels of one fill the gaps between those of the other."""


class AdmissionQueue:
    """The calls of one pipeline that wait or run, in the order in which they came."""

    def __init__(self) -> None:
        self.at_once = AT_ONCE
        self.admissions: list[Admission] = []
        self.changed = threading.Condition()

    def enter(self, *, alone: bool, must_run: bool = False) -> Admission:
        """Queue a call; the admission returned is to be entered around it, which gives its place up.

        Args:
            alone: the call starts once all before it have left, and those after it once it has left; otherwise what
                comes before and after their loops overlaps.
            must_run: the call starts even when it is cancelled, since other ranks make it too.
        """
        admission = Admission(self, alone=alone, must_run=must_run)
        with self.changed:
            self.admissions.append(admission)
        return admission


class Admission:
    """The place of one call in an `AdmissionQueue`."""

    def __init__(self, queue: AdmissionQueue, *, alone: bool, must_run: bool) -> None:
        self.alone = alone
        self._must_run = must_run
        self._queue = queue
        self._begun = self._ended = self._cancelled = False

    def __enter__(self) -> Admission:
        """Wait until the call may start.

        Raises:
            Cancelled: it was cancelled meanwhile.
        """
        try:
            if self.alone:
                self._wait(lambda before: not before)
            else:
                self._wait(lambda before: all(each._begun and not each.alone for each in before))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._queue.changed:
            self._queue.admissions.remove(self)
            self._queue.changed.notify_all()

    def begin(self) -> None:
        """Wait until few enough of the calls before this one still denoise.

        Raises:
            Cancelled: it was cancelled meanwhile.
        """
        self._wait(lambda before: sum(not each._ended for each in before) < self._queue.at_once)
        self._begun = True
        self._notify()

    def end(self) -> None:
        """Let the next call denoise; harmless when repeated."""
        self._begun = self._ended = True
        self._notify()

    def cancel(self) -> None:
        """Let the call raise `Cancelled` where it waits, now or later."""
        self._cancelled = not self._must_run
        self._notify()

    def _notify(self) -> None:
        with self._queue.changed:
            self._queue.changed.notify_all()

    def _wait(self, ready: Callable[[Sequence[Admission]], bool]) -> None:
        queue = self._queue
        with queue.changed:
            queue.changed.wait_for(lambda: self._cancelled or ready(queue.admissions[: queue.admissions.index(self)]))
            if self._cancelled:
                raise Cancelled("the call was cancelled while it waited for its turn")


ADMISSION = Slot[Admission]()
"""That of a call that overlaps with others."""
