"""Turns: of several calls that overlap, so many denoise at a time, in the order of the requests."""

from __future__ import annotations

import sys
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
        self._refused = self._refused_start = sys.maxsize
        self._stopped = False

    def wait_to_start(self, position: int) -> None:
        """Wait until the request before this one denoises: what comes before and after a loop overlaps with it."""
        self._wait(lambda: self._begun >= position - 1 or position >= self._refused_start)
        self._refuse(position >= self._refused_start)

    def begin(self, position: int) -> None:
        """Wait until few enough of the requests before this one still denoise."""
        self._wait(lambda: position >= self._refused or position - len(self._ended) < self._at_once)
        with self._changed:
            self._refuse(position >= self._refused)
            self._begun = max(self._begun, position)
            self._changed.notify_all()

    def end(self, position: int) -> None:
        """This request needs the denoiser no longer."""
        with self._changed:
            self._begun = max(self._begun, position)
            self._ended.add(position)
            self._changed.notify_all()

    def fail(self, position: int) -> None:
        """This request has failed. If it did so before the end of its loop, none after it begins its own.

        Nor does one start that does not start before. Other ranks, on which the request fails alike, say the same of
        each request, whichever of their threads comes first.
        """
        with self._changed:
            if position not in self._ended:
                self._refused = min(self._refused, position + 1)
                self._refused_start = min(self._refused_start, position + (2 if self._begun >= position else 1))
            self._changed.notify_all()

    def has_ended(self, position: int) -> bool:
        """Whether this request has said that it needs the denoiser no longer."""
        return position in self._ended

    def stop(self) -> None:
        """Make everyone who waits, now or later, raise `Cancelled`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _refuse(self, refused: bool) -> None:
        if refused:
            raise Cancelled("the call was cancelled, because one before it has failed")

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

    def fail(self) -> None:
        """This request has failed; to be told before its end."""
        self.turns.fail(self.position)

    @property
    def has_ended(self) -> bool:
        """Whether another request may denoise by now."""
        return self.turns.has_ended(self.position)

    def end(self) -> None:
        """Let the next request denoise; harmless when repeated."""
        self.turns.end(self.position)
