"""Turns: of several calls that overlap, so many denoise at a time, in the order of the requests."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeboost.core.errors import Cancelled

TURN = "turn"
"""Where a call's state keeps its `Turn`."""


class Turns:
    """The order of a list of requests. Each request has a `Turn`, by its position.

    Args:
        at_once: requests that may denoise at a time.
    """

    def __init__(self, *, at_once: int) -> None:
        self._at_once = at_once
        self._changed = threading.Condition()
        self._begun = -1
        self._ended: set[int] = set()
        self._stopped = False

    def wait_to_start(self, position: int) -> None:
        """Wait until the request before this one denoises: what comes before and after a loop overlaps with it."""
        self._wait(lambda: self._begun >= position - 1)

    def begin(self, position: int) -> None:
        """Wait until few enough of the requests before this one still denoise."""
        self._wait(lambda: position - len(self._ended) < self._at_once)
        with self._changed:
            self._begun = max(self._begun, position)
            self._changed.notify_all()

    def end(self, position: int) -> None:
        """This request needs the denoiser no longer."""
        with self._changed:
            self._begun = max(self._begun, position)
            self._ended.add(position)
            self._changed.notify_all()

    def stop(self) -> None:
        """Make everyone who waits, now or later, raise `Cancelled`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or ready())
            if self._stopped:
                raise Cancelled("the call was cancelled while it waited for its turn")


class Turn:
    """One request's place in the order of `turns`."""

    def __init__(self, turns: Turns, position: int) -> None:
        self.turns = turns
        self.position = position

    def wait_to_start(self) -> None:
        """Wait until the request before this one denoises."""
        self.turns.wait_to_start(self.position)

    def begin(self) -> None:
        """Wait until few enough of the requests before this one still denoise."""
        self.turns.begin(self.position)

    def end(self) -> None:
        """Let the next request denoise; harmless when repeated."""
        self.turns.end(self.position)
