"""The other processes on this host: noticing at once that one dies, and of what, also before it has arrived."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeboost.distributed.authentication import VARIABLE
from pipeboost.distributed.failure.records import Failure

STAGE = "accelerate_pipeline"
_STARTS = 10.0
"""Seconds in which ranks that are started one after another have begun."""
_PAUSE = 0.2
"""Seconds between two looks at all processes."""
_GET_INFO, _INFO_FORMAT = 3 << 30 | 64 << 16 | 0xFF << 8 | 11, "=QQ11Ii"
"""Linux' PIDFD_GET_INFO for 64 bytes: a mask, a control group, eleven numbers, an exit status."""
_INFO_EXIT = 8
"""In the mask: the exit status, which Linux has since 6.15, once the parent has asked for it."""


class Process(NamedTuple):
    """A process.

    Attributes:
        host: the machine and the space of process numbers that it is in.
        pid: its number there.
        start: when it started, so that a later process with the same number is not taken for it.
    """

    host: str
    pid: int
    start: int

    def is_local(self) -> bool:
        """Whether it is another process on this host."""
        return bool(self.host) and self.host == _host() and self.pid != os.getpid()


@functools.cache
def _host() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""  # no Linux: every process counts as one of another machine


def this_process() -> Process:
    """Return the process that asks."""
    return Process(_host(), os.getpid(), _stat(os.getpid())[1])


class Death(NamedTuple):
    """How a process died.

    Attributes:
        how: such as `was killed by SIGKILL`.
        signal: name of the signal; None if it was none, or is not known.
    """

    how: str
    signal: str | None = None


class LocalProcess:
    """Another process on this host, which may die."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.descriptor: int | None = None
        """Becomes readable when it dies; None where the system has none."""
        with contextlib.suppress(AttributeError, OSError):  # gone already, or the system cannot do it: `death` looks
            self.descriptor = os.pidfd_open(process.pid)
            weakref.finalize(self, os.close, self.descriptor)

    def death(self) -> Death | None:
        """Return how it died; None while it lives.

        Before Linux 6.15 nobody knows what killed it where its parent asked sooner than this.
        """
        state, start, status = _stat(self._process.pid)
        if start != self._process.start:
            status = self._status()
        elif state not in "ZX":
            return None
        return Death("has died") if status is None else death_by(os.waitstatus_to_exitcode(status))

    def _status(self) -> int | None:
        if self.descriptor is not None:
            with contextlib.suppress(OSError):
                info = struct.pack(_INFO_FORMAT, _INFO_EXIT, *[0] * 13)
                mask, *_, status = struct.unpack(_INFO_FORMAT, fcntl.ioctl(self.descriptor, _GET_INFO, info))
                return int(status) if mask & _INFO_EXIT else None
        return None


def death_by(code: int) -> Death:
    """Return how a process died that has this exit code, which is negative for a signal."""
    if code >= 0:
        return Death(f"has exited with code {code}")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return Death(f"was killed by {name}", name)


def _stat(pid: int) -> tuple[str, int, int | None]:
    """State, time of the start and exit status; none of them where there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0, None
    return after_name[0], int(after_name[19]), int(after_name[49])


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

    def __init__(self, announced: Callable[[int], Process | None] = lambda rank: None) -> None:
        self._announced = announced
        self._known: dict[int, LocalProcess] = {}
        self._began, self._looked = time.monotonic(), 0.0

    def check(self, missing: Sequence[int]) -> None:
        """Raise where one of them is dead.

        Raises:
            RankFailedError: with its signal, where that is known.
        """
        now, death = time.monotonic(), None
        if now < self._looked + _PAUSE:
            return
        self._looked = now
        started = _started_here() if now - self._began > _STARTS else None
        for rank in missing:
            if rank not in self._known and (process := self._announced(rank)) is not None and process.is_local():
                self._known[rank] = LocalProcess(process)
            if rank in self._known:
                death = self._known[rank].death()
            elif started is not None and rank not in started:
                death = Death("has no process on this machine")
            if death is not None:
                description = f"rank {rank} {death.how}, and did not come to {STAGE!r}"
                raise Failure(rank, STAGE, description, death.signal).error()


def _started_here() -> set[int] | None:
    """The ranks of this world that have a process; None where some may be on another machine, or nobody knows."""
    own = _environment("self")
    if "RANK" not in own or own.get("MASTER_ADDR") not in ("localhost", "127.0.0.1", "::1"):
        return None
    found = [_environment(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    same = ("WORLD_SIZE", "MASTER_PORT")
    return {int(each["RANK"]) for each in found if "RANK" in each and all(each.get(n) == own.get(n) for n in same)}


def _environment(process: str) -> dict[str, str]:
    """What a process was started with; empty where it is another user's, or dead."""
    try:
        lines = Path("/proc", process, "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)
