"""One run of the worker, as the server sees it: its process group, the socket of its ranks, and their signs of life."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeboost.core.errors import ConfigurationError, shortened
from pipeboost.serving.logs import LOG
from pipeboost.serving.wire import (
    LONGEST_LINE,
    SETTINGS,
    SOCKET,
    Beat,
    Hello,
    Message,
    WireError,
    WorkerSettings,
    pack,
    to_json,
    unpack,
)

_TO_CONNECT = 5.0
_TO_DIE = 10.0
_OF_SERVER = "PIPEBOOST_SERVE_"
"""Variables of the server's flags, keys among them, which are none of the worker's business."""


class WorkerProcess:
    """A worker from its start to its end.

    Args:
        settings: what it loads.
        folder: is made for it, and nobody else's; the settings and the socket are in it.

    Attributes:
        refusal: why it cannot load, in a sentence; empty where it has not said so.
        death: how it has ended; empty while it has not.
        pids: number of each rank's process.
    """

    def __init__(self, settings: WorkerSettings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._process: asyncio.subprocess.Process | None = None
        self._server: asyncio.Server | None = None
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._alive: dict[int, float] = {}
        self._take: Callable[[Message], None] = lambda message: None
        self._broken = asyncio.Event()
        self._killing = asyncio.Lock()
        self.refusal = ""
        self.pids: dict[int, int] = {}
        self.death = ""

    async def start(self, take: Callable[[Message], None]) -> None:
        """Start it.

        Args:
            take: is called with what its ranks say.

        Raises:
            ConfigurationError: the folder cannot be made.
        """
        self._take = take
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(mode=0o700, parents=True)
            (self._folder / SETTINGS).write_text(json.dumps(to_json(self._settings)))
            listening = _listening(self._folder)
        except OSError as error:
            raise ConfigurationError(f"{self._folder} cannot be made: {error.strerror or error}") from error
        self._server = await asyncio.start_unix_server(self._serve_rank, sock=listening, limit=LONGEST_LINE)
        words = "-m", "pipeboost.serving.worker", str(self._folder.resolve()), str(os.getpid())
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr if _is_real(sys.stderr) else asyncio.subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith(_OF_SERVER)},
            start_new_session=True,  # a group of its own, which Ctrl-C in a terminal does not reach
        )

    async def ended(self) -> None:
        """Wait until its process has ended, or a rank's connection."""
        assert self._process is not None
        waits = [asyncio.ensure_future(self._process.wait()), asyncio.ensure_future(self._broken.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not waits[0].done():  # it ends in the next moment, and then says of what
                await asyncio.wait(waits[:1], timeout=1.0)
        finally:
            for each in waits:
                each.cancel()
        code, self.death = self._process.returncode, "a rank of the worker has ended"
        if code is not None and code < 0:
            self.death = f"the worker was killed by {signal.Signals(-code).name}"
        elif code is not None:
            self.death = f"the worker has exited with code {code}"

    def send(self, message: Message, *, rank: int | None = None) -> None:
        """Send to a rank, or to all of them. What a dead one does not get is lost."""
        line = pack(message)
        for number, writer in self._writers.items():
            if rank in (None, number) and not writer.is_closing():
                writer.write(line)

    def silent_for(self, now: float, most: float) -> int | None:
        """Return the first rank that has given no sign of life for longer; None where all have."""
        return next((rank for rank, at in sorted(self._alive.items()) if now - at > most), None)

    def excuse(self, seconds: float) -> None:
        """Leave out a time in which this process read nothing."""
        for rank in self._alive:
            self._alive[rank] += seconds

    async def kill(self) -> None:
        """End all its processes, stopped ones too; harmless when repeated."""
        self._take = lambda message: None  # what is still to be read is of a worker that is over
        async with self._killing:
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()
                await _emptied(self._process.pid)
                self._process = None
            for writer in self._writers.values():
                writer.close()
            if self._server is not None:
                self._server.close()
                self._server = None
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _serve_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = unpack(await asyncio.wait_for(reader.readline(), _TO_CONNECT))
            if not isinstance(hello, Hello) or hello.rank in self._writers:
                raise WireError(f"{shortened(repr(hello), 100)} is no greeting")
            self._writers[hello.rank], self._alive[hello.rank] = writer, time.monotonic()
            self.pids[hello.rank] = hello.pid
            while line := await reader.readline():
                message = unpack(line)
                self._alive[hello.rank] = time.monotonic()
                if hello.rank == 0 or isinstance(message, Beat):
                    self._take(message)
        except (OSError, ValueError, WireError, TimeoutError, asyncio.TimeoutError) as error:
            LOG.warning("the worker's connection broke: %s", type(error).__name__)
        finally:
            writer.close()
            self._broken.set()


def _listening(folder: Path) -> socket.socket:
    """Listen in a folder, by its descriptor, since a Unix socket's path may be no longer than some hundred bytes."""
    listening, descriptor = socket.socket(socket.AF_UNIX), os.open(folder, os.O_RDONLY)
    try:
        listening.bind(f"/proc/self/fd/{descriptor}/{SOCKET}")
    finally:
        os.close(descriptor)
    return listening


def _is_real(stream: object) -> bool:
    """Whether a stream is of the system, which a process can write to."""
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


async def _emptied(group: int) -> None:
    """Wait until a killed group of processes is gone; who is not our child is reaped by others, in its time."""
    until = time.monotonic() + _TO_DIE
    while time.monotonic() < until and _has_living(group):
        await asyncio.sleep(0.02)


def _has_living(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if its_group == str(group) and state not in "ZX":
                    return True
    return False
