"""`Absence`: whether a rank that has not arrived is dead, as far as this machine shows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeboost.distributed.authentication import VARIABLE
from pipeboost.distributed.failure.local_processes import LocalProcess, Process
from pipeboost.distributed.failure.records import Failure

STAGE = "accelerate_pipeline"
_STARTS = 10.0
"""Seconds in which ranks that are started one after another have begun."""
_PAUSE = 0.2
"""Seconds between two looks at all processes."""


def patience() -> float:
    """Return the seconds that a rank may take to arrive, as ranks load their weights more or less slowly.

    A launcher ends the others where one dies; without a known one a dead rank must not be waited for as long.
    """
    return 600.0 if VARIABLE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ else 120.0


class Absence:
    """Whether ranks that have not arrived are dead.

    Args:
        announced: the process of a rank that has announced it.
    """

    def __init__(self, announced: Callable[[int], Process | None]) -> None:
        self._announced = announced
        self._known: dict[int, LocalProcess] = {}
        self._began = time.monotonic()
        self._next = 0.0

    def check(self, missing: Sequence[int]) -> None:
        """Raise where one of them is dead.

        Raises:
            RankFailedError: with its signal, where that is known.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PAUSE
        started = _started_here() if now - self._began > _STARTS else None
        for rank in missing:
            if rank not in self._known and (process := self._announced(rank)) is not None and process.is_local():
                self._known[rank] = LocalProcess(process)
            if rank in self._known:
                if (death := self._known[rank].death()) is not None:
                    description = f"rank {rank} {death.how} before it came to {STAGE!r}"
                    raise Failure(rank, STAGE, description, death.signal).error()
            elif started is not None and rank not in started:
                description = f"rank {rank} has no process on this machine, and did not come to {STAGE!r}"
                raise Failure(rank, STAGE, description).error()


def _started_here() -> set[int] | None:
    """The ranks of this world that have a process; None where some may be on another machine, or nobody knows."""
    own = _environment("self")
    if "RANK" not in own or own.get("MASTER_ADDR") not in ("localhost", "127.0.0.1", "::1"):
        return None
    found = (_environment(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    same = ("WORLD_SIZE", "MASTER_PORT")
    return {int(each["RANK"]) for each in found if "RANK" in each and all(each.get(n) == own.get(n) for n in same)}


def _environment(process: str) -> dict[str, str]:
    """What a process was started with; empty where it is another user's, or dead."""
    try:
        lines = Path("/proc", process, "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)
