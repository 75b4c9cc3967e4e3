"""`suspend_timeout`: what excuses a rank that is late."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

querying = threading.Lock()
"""Held while a thread asks the GPU whether something is done, which nobody may while a CUDA graph is captured."""
_doing: list[str] = []


@contextlib.contextmanager
def suspend_timeout(doing: str) -> Iterator[None]:
    """Inside, this rank loads, compiles or captures, as `doing` says: the others wait for it while it lives.

    May be entered by any thread, several times over.
    """
    with querying:
        _doing.append(doing)
    try:
        yield
    finally:
        _doing.remove(doing)


def suspended_for() -> str:
    """Return what suspends the time-out in this process; empty if nothing does."""
    latest = _doing[-1:]
    return latest[0] if latest else ""
