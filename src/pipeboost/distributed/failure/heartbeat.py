"""`Mail`: a thread that exchanges records with other ranks through the store, so that no other thread waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from pipeboost.distributed.failure.records import Record

_ANSWER = timedelta(seconds=10)


class Mail:
    """Exchanges records again and again, from `start` to `stop`; may be started again.

    Args:
        store: torch's, where the ranks meet; a connection of our own to it is made.
        name: of the mesh, the same on all its ranks.
        rank: of the world, this process's.
        others: the ranks it hears from.
        compose: makes this rank's record.
        pause: seconds between two exchanges.

    Attributes:
        records: the latest of each rank that has said something.
        heard: when, by `time.monotonic`, each rank's record was last a new one.
        answered: when the store last did.
        lost: what went wrong with the store; None while it answers.
    """

    def __init__(
        self, store: Any, name: str, rank: int, others: Sequence[int], compose: Callable[[], Record], pause: float
    ) -> None:
        self._store = _connection(store)
        self._outbox = _connection(store)  # never waits for an answer
        self._sending = threading.Lock()
        self._name = name
        self._rank = rank
        self._others = tuple(others)
        self._compose = compose
        self.pause = pause
        self.records: dict[int, Record] = {}
        self.heard: dict[int, float] = {}
        self.answered = time.monotonic()
        self.lost: Exception | None = None
        self.on_news: Callable[[], None] = nothing_to_do
        self._asked = self._served = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to exchange records, after a pause."""
        if self._thread is not None and self._thread.is_alive():
            return  # it waits for a store that does not answer; `lost` says so
        self.lost = None
        self._stopping = False
        self._served = self._asked
        self.answered = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="pipeboost mail", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop; nothing is left running, unless the store does not answer."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(1.0)
            if self._thread.is_alive():
                self.lost = TimeoutError("the store where the ranks meet does not answer")

    def exchange(self, limit: float = 2.0) -> bool:
        """Send a new record and read what the others have to say now; whether that was done within `limit` seconds."""
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: self._served >= mine or self.lost is not None or self._stopping, limit
            )

    def send(self) -> None:
        """Send a new record at once: should this process be killed in the next moment, the others will read it."""
        if self.lost is None:
            try:
                self._send()
            except RuntimeError as error:
                self.lost = error

    def hurry(self) -> None:
        """Exchange records soon, without waiting for it."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked > self._served or self._stopping, self.pause)
                asked = self._asked
                if self._stopping and asked == self._served:
                    return
            try:
                self._exchange()
            except RuntimeError as error:  # torch's errors of stores are among these
                with self._changed:
                    self.lost = error
                    self._changed.notify_all()
                self.on_news()
                return
            self.answered = time.monotonic()
            with self._changed:
                self._served = asked
                self._changed.notify_all()
            self.on_news()

    def _send(self) -> None:
        with self._sending:  # so that none is overwritten by an older one
            self._outbox.set(self._key(self._rank), self._compose().to_bytes())

    def _exchange(self) -> None:
        self._send()
        known = [rank for rank in self._others if rank in self.records or self._store.check([self._key(rank)])]
        if not known:
            return
        now = time.monotonic()
        for rank, text in zip(known, self._store.multi_get([self._key(rank) for rank in known]), strict=True):
            record = Record.from_bytes(text)
            before = self.records.get(rank)
            if before is None or before.beat != record.beat:
                self.heard[rank] = now
            self.records[rank] = record

    def _key(self, rank: int) -> str:
        return f"{self._name} record {rank}"


def _connection(store: Any) -> Any:
    own = store.clone()
    own.set_timeout(_ANSWER)
    return own


def nothing_to_do() -> None:
    """What `Mail.on_news` is where nobody waits for news."""
