"""Turns: of several calls that overlap, one denoises at a time, in the order of the requests."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeboost.errors import Cancelled

TURN = "turn"
"""Where a call's state keeps its `Turn`."""


class Turns:
    """The order of a list of requests. Each request has a `Turn`, by its position."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = -1
        self._ended = -1
        self._stopped = False

    def wait_to_start(self, position: int) -> None:
        """Wait until the request before this one denoises: what comes before and after a loop overlaps with it."""
        self._wait(lambda: self._begun >= position - 1)

    def begin(self, position: int) -> None:
        """Wait until the request before this one has denoised."""
        self._wait(lambda: self._ended >= position - 1)
        with self._changed:
            self._begun = max(self._begun, position)
            self._changed.notify_all()

    def end(self, position: int) -> None:
        """This request needs the denoiser no longer."""
        with self._changed:
            self._begun = max(self._begun, position)
            self._ended = max(self._ended, position)
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
        self._position = position

    def wait_to_start(self) -> None:
        """Wait until the request before this one denoises."""
        self.turns.wait_to_start(self._position)

    def begin(self) -> None:
        """Wait until the request before this one has denoised."""
        self.turns.begin(self._position)

    def end(self) -> None:
        """Let the next request denoise; harmless when repeated."""
        self.turns.end(self._position)
