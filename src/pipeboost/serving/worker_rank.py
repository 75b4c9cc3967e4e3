"""One rank of the worker: connected to the server before anything else, it loads the model and runs job after job.

Three threads: this one loads and runs, one reads what the server says, one says that the process lives.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeboost.core.errors import PipeboostError, RankFailedError, one_line
from pipeboost.serving.jobs import CANCELLED, REFUSED, WORKER_LOST
from pipeboost.serving.logs import LOG, trail
from pipeboost.serving.wire import (
    LONGEST_LINE,
    SOCKET,
    Advanced,
    Beat,
    Done,
    Failed,
    Hello,
    Message,
    Preview,
    Ready,
    Refused,
    Start,
    Stop,
    WireError,
    WorkerSettings,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from pipeboost.serving.worker_model import WorkerModel

_BEAT = 0.5
"""Seconds between two signs of life."""
_FIRST_TO_SPEAK = 5.0
"""Seconds that other ranks leave the first one to say what all of them refuse."""


def serve_rank(folder: Path, settings: WorkerSettings) -> NoReturn:
    """Run jobs until the server goes."""
    _Rank(folder, settings).serve()


class _Rank:
    def __init__(self, folder: Path, settings: WorkerSettings) -> None:
        self._settings, self._rank = settings, int(os.environ.get("RANK", 0))
        self._socket = _connected(folder)
        self._sending = threading.Lock()
        self._starts: queue.SimpleQueue[Start] = queue.SimpleQueue()
        self._jobs = threading.Lock()  # for the next two
        self._known: set[str] = set()
        self._stopped: set[str] = set()
        self._doing = "loading"

    def serve(self) -> NoReturn:
        self._say(Hello(self._rank, os.getpid()))
        for run in (self._read, self._beat):
            threading.Thread(target=run, name=f"pipeboost {run.__name__[1:]}", daemon=True).start()
        model = self._load()
        self._doing = ""
        if self._rank == 0:
            self._say(Ready(model.card))
        while True:
            start = self._starts.get()
            end = self._run(model, start)
            with self._jobs:
                self._known.discard(start.job)
                self._stopped.discard(start.job)
            if self._rank == 0:
                self._say(end)

    def _load(self) -> WorkerModel:
        try:
            _quieten()
            from pipeboost.serving.worker_model import WorkerModel

            model = WorkerModel(self._settings, on_status=self._note)
            for size in self._settings.warm_sizes:
                self._note(f"warming {'x'.join(map(str, size))}")
                model.warm(size)
            return model
        except RankFailedError:
            raise
        except PipeboostError as error:
            if self._rank == 0:
                self._say(Refused(str(error)))
            else:
                time.sleep(_FIRST_TO_SPEAK)
            raise SystemExit(1) from None

    def _run(self, model: WorkerModel, start: Start) -> Done | Failed:
        from pipeboost.serving.worker_errors import is_fatal, outcome_of

        try:
            ran = model.run(
                start,
                advance=lambda stage, step, steps: self._advance(start.job, stage, step, steps),
                preview=lambda file: self._say(Preview(start.job, file)),
                is_stopped=lambda: start.job in self._stopped,
            )
            if start.job in self._stopped:
                return Failed(start.job, CANCELLED, "the job was cancelled")
            return Done(start.job, ran)
        except Exception as error:
            code, sentence = outcome_of(error)
            _log(start.job, code, error)
            # Ranks agree on what they refuse and what is cancelled; of other errors, another rank may know nothing.
            alone = self._settings.ranks == 1 or code in (CANCELLED, REFUSED)
            if is_fatal(error) or not alone:
                if self._rank == 0 and code != WORKER_LOST:
                    self._say(Failed(start.job, code, sentence, last=True))
                _end()
            end = Failed(start.job, code, sentence)
        _free()  # once the error and its frames are gone
        return end

    def _note(self, doing: str) -> None:
        self._doing = doing

    def _advance(self, job: str, stage: str, step: int, steps: int) -> None:
        if self._rank == 0:
            self._say(Advanced(job, stage, step, steps))

    def _say(self, message: Message) -> None:
        try:
            line = pack(message)
            with self._sending:
                self._socket.sendall(line)
        except OSError:
            _end()  # the server is gone

    def _read(self) -> None:
        """Take what the server says; its end is this process's."""
        try:
            with self._socket.makefile("rb") as lines:
                while line := lines.readline(LONGEST_LINE + 1):
                    self._take(unpack(line))
        except (OSError, WireError) as error:
            LOG.warning("worker: %s", one_line(error))
        finally:
            _end()

    def _take(self, message: Message) -> None:
        if isinstance(message, Start):
            with self._jobs:
                self._known.add(message.job)
            self._starts.put(message)
        elif isinstance(message, Stop):
            with self._jobs:
                if message.job in self._known:
                    self._stopped.add(message.job)  # which the job asks for at each stage and step
        else:
            raise WireError(f"a server does not send {type(message).__name__}")

    def _beat(self) -> None:
        while True:
            self._say(Beat(self._rank, self._doing or _suspended(), _memory()))
            time.sleep(_BEAT)


def _connected(folder: Path) -> socket.socket:
    """Connect by the folder's descriptor, since the path of a Unix socket may be no longer than some hundred bytes."""
    connection, descriptor = socket.socket(socket.AF_UNIX), os.open(folder, os.O_RDONLY)
    try:
        connection.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
    finally:
        os.close(descriptor)
    return connection


def _quieten() -> None:
    """Silence the libraries, whose warnings quote prompts."""
    import logging
    import warnings

    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()


def _suspended() -> str:
    """What suspends time-outs; without an import while the main thread imports."""
    module: Any = sys.modules.get("pipeboost.distributed.failure.collective_wait")
    suspended_for = getattr(module, "suspended_for", None)
    return suspended_for() if suspended_for is not None else ""


def _memory() -> dict[str, int]:
    """Bytes of the process, and where torch uses a GPU those of its allocator."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    found, torch = {"rss": resident}, sys.modules.get("torch")
    cuda: Any = getattr(torch, "cuda", None)
    with contextlib.suppress(AttributeError):  # while it is imported
        if cuda is not None and cuda.is_initialized():
            found |= {"allocated": cuda.memory_allocated(), "reserved": cuda.memory_reserved()}
    return found


def _free() -> None:
    """Give back what a failed job has left."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _log(job: str, code: str, error: BaseException) -> None:
    """Say what a job failed of, without the exception's own text, which may quote the prompt."""
    if code == CANCELLED:
        return
    LOG.warning("worker: job %s: %s: %s", job, code, trail(error))


def _end() -> NoReturn:
    os._exit(1)
