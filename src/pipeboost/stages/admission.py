"""Admission: in which order the calls of one pipeline start, and how many of them denoise at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from pipeboost.core.errors import Cancelled

TURN = "turn"
"""Where the state of a call that overlaps with others keeps its `Turn`."""
AT_ONCE = 2
"""Calls in their loops at a time: the kernels of one fill the gaps between those of the other."""


class Admission:
    """The calls of one pipeline that wait or run, in the order in which they came."""

    def __init__(self) -> None:
        self._at_once = AT_ONCE
        self._turns: list[Turn] = []
        self._changed = threading.Condition()

    def enter(self, *, alone: bool, must_run: bool = False) -> Turn:
        """The turn of a call that comes now; to be entered around the call, which gives it up.

        Args:
            alone: the call starts once all before it have left, and those after it once it has left; otherwise what
                comes before and after the loops of neighbours overlaps with them.
            must_run: the call starts even when it is cancelled, since other ranks make it too.
        """
        turn = Turn(self, alone=alone, must_run=must_run)
        with self._changed:
            self._turns.append(turn)
        return turn


class Turn:
    """The place of one call in an `Admission`."""

    def __init__(self, admission: Admission, *, alone: bool, must_run: bool) -> None:
        self.alone = alone
        self._must_run = must_run
        self._admission = admission
        self._begun = self._ended = self._cancelled = False

    def __enter__(self) -> Turn:
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
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def begin(self) -> None:
        """Wait until few enough of the calls before this one still denoise.

        Raises:
            Cancelled: it was cancelled meanwhile.
        """
        self._wait(lambda before: sum(not each._ended for each in before) < self._admission._at_once)
        with self._admission._changed:
            self._begun = True
            self._admission._changed.notify_all()

    def end(self) -> None:
        """Let the next call denoise; harmless when repeated."""
        with self._admission._changed:
            self._begun = self._ended = True
            self._admission._changed.notify_all()

    def cancel(self) -> None:
        """Let the call raise `Cancelled` where it waits, now or later."""
        with self._admission._changed:
            self._cancelled = not self._must_run
            self._admission._changed.notify_all()

    def _leave(self) -> None:
        with self._admission._changed:
            self._admission._turns.remove(self)
            self._admission._changed.notify_all()

    def _wait(self, ready: Callable[[Sequence[Turn]], bool]) -> None:
        turns = self._admission._turns
        with self._admission._changed:
            self._admission._changed.wait_for(lambda: self._cancelled or ready(turns[: turns.index(self)]))
            if self._cancelled:
                raise Cancelled("the call was cancelled while it waited for its turn")
