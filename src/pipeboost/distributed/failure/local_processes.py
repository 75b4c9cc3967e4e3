"""The other processes of this machine: noticing at once that one dies, and telling of what."""

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

_STATE, _START, _EXIT_CODE = 2, 21, 51
"""Places in /proc/<pid>/stat, from 0."""
_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
"""Linux' PIDFD_GET_INFO for 64 bytes: a mask, a control group, eleven numbers, an exit status."""
_INFO_FORMAT = "=QQ11Ii"
_INFO_EXIT = 8
"""In the mask: the exit status, which Linux tells since 6.15, once the parent has asked for it."""


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

    def is_neighbour(self) -> bool:
        """Whether it is another process of this machine."""
        return bool(self.host) and self.host == _host() and self.pid != os.getpid()


@functools.cache
def _host() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""  # no Linux: every process counts as one of another machine


def this_process() -> Process:
    """The process that asks."""
    facts = _facts(os.getpid())
    return Process(_host(), os.getpid(), int(facts[_START]) if facts else 0)


class Death(NamedTuple):
    """How a process died.

    Attributes:
        how: such as `was killed by SIGKILL`.
        signal: name of the signal; None if it was none, or cannot be told.
    """

    how: str
    signal: str | None


class Neighbour:
    """Another process of this machine, which may die."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.descriptor: int | None = None
        """Becomes readable when it dies; None where the system has none."""
        with contextlib.suppress(AttributeError, OSError):  # gone already, or the system cannot do it: `death` looks
            self.descriptor = os.pidfd_open(process.pid)
            self._close = weakref.finalize(self, os.close, self.descriptor)

    def death(self) -> Death | None:
        """How it died; None while it lives.

        Before Linux 6.15 it is not told what killed it where its parent was faster to ask than we are.
        """
        facts = _facts(self.process.pid)
        if facts is not None and int(facts[_START]) == self.process.start:
            if facts[_STATE] not in "ZX":
                return None
            return death_by(os.waitstatus_to_exitcode(int(facts[_EXIT_CODE])))
        status = self._status()
        return Death("has died", None) if status is None else death_by(os.waitstatus_to_exitcode(status))

    def _status(self) -> int | None:
        if self.descriptor is None:
            return None
        info = struct.pack(_INFO_FORMAT, _INFO_EXIT, *[0] * 13)
        try:
            told = struct.unpack(_INFO_FORMAT, fcntl.ioctl(self.descriptor, _GET_INFO, info))
        except OSError:
            return None
        return told[-1] if told[0] & _INFO_EXIT else None

    def close(self) -> None:
        """Give it up."""
        if self.descriptor is not None:
            self._close()
            self.descriptor = None


def death_by(code: int) -> Death:
    """How a process died that has this exit code, which is negative for a signal."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Death(f"was killed by {name}", name)
    return Death(f"has exited with code {code}", None)


def _facts(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    before, _, after = text.rpartition(")")  # the name of a program may hold anything
    return [before.split("(")[0].strip(), before.partition("(")[2], *after.split()]
