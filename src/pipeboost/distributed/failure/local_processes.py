"""The other processes on this host: noticing at once that one dies, and of what."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
import struct
import weakref
from pathlib import Path
from typing import NamedTuple

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
    _, start, _ = _stat(os.getpid()) or ("", 0, 0)
    return Process(_host(), os.getpid(), start)


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
        found = _stat(self._process.pid)
        if found is None or found[1] != self._process.start:
            status = self._status()
        elif found[0] in "ZX":
            status = found[2]
        else:
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


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, time of the start and exit status; None where there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return after_name[0], int(after_name[19]), int(after_name[49])
