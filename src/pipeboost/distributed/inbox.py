"""`Inbox`: a thread that receives the messages of a wire, so that they arrive whatever the other threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from pipeboost.distributed.collectives.collective_wait import expecting
from pipeboost.distributed.wire import Kind, Message, Wire

_PAUSE = 0.1
"""Seconds between two looks whether the other ranks still run."""


class Inbox:
    """The messages of one wire, from `start` to the one that says it is over."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._messages: list[Message] = []
        self._received = 0
        self._broken: BaseException | None = None
        self._over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pipeboost inbox", daemon=True)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def take(self, what: str, wanted: Callable[[Message], bool]) -> Message:
        """The message that is `wanted`, once it is there. `what` it is called while this rank waits for it.

        Raises:
            RankFailedError: another rank has failed, or sends nothing for too long.
        """
        while True:
            with self._changed, expecting(self._wire.control, what) as check:
                found = next((message for message in self._messages if wanted(message)), None)
                if found is not None:
                    self._messages.remove(found)
                    return found
                seen = self._received
                while self._received == seen:  # any new one shows that the sender is alive
                    self._wait(check)

    def next(self) -> Message:
        """The next message: one of an earlier request before one of a later, and the last one last.

        Raises:
            RankFailedError: another rank has failed.
        """
        with self._changed, expecting(self._wire.control, "what to do next", whenever=True) as check:
            while not self._messages:
                self._wait(check)
            found = min(self._messages, key=lambda message: (message.kind is Kind.OVER, message.request))
            self._messages.remove(found)
            return found

    def wait_until_over(self, patience: float | None = None) -> None:
        """Wait for the last message; no longer than `patience` seconds, if a number is given.

        Raises:
            RankFailedError: another rank has failed, or sends nothing for too long.
        """
        until = None if patience is None else time.monotonic() + patience
        with self._changed, expecting(self._wire.control, "the end of the call", whenever=until is not None) as check:
            while not self._over and (until is None or time.monotonic() < until):
                self._wait(check)

    def join(self) -> None:
        """Wait for the thread, whose groups are broken if it has not received the last message."""
        if self._thread.ident is not None:
            self._thread.join()

    def _wait(self, check: Callable[[], None]) -> None:
        self._changed.wait(_PAUSE)
        check()
        if self._broken is not None:
            raise self._broken

    def _run(self) -> None:
        try:
            if self._wire.device.type == "cuda":
                torch.cuda.set_device(self._wire.device)
            while not self._over:
                message = self._wire.receive()
                with self._changed:
                    self._over = message.kind is Kind.OVER
                    self._received += 1
                    self._messages.append(message)
                    self._changed.notify_all()
        except BaseException as error:  # raised by whoever waits for a message
            with self._changed:
                self._broken = error
                self._changed.notify_all()
