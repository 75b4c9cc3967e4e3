"""`Supervisor`: starts the worker, gives it one job at a time, and starts it again when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from pipeboost.core.errors import ConfigurationError
from pipeboost.serving.errors import JobCancelled, JobError, WorkerLost
from pipeboost.serving.jobs import CANCELLED, REFUSED, WORKER_LOST, Job, ModelCard, Paths
from pipeboost.serving.logs import LOG
from pipeboost.serving.wire import (
    Advanced,
    Beat,
    Done,
    Failed,
    Message,
    Preview,
    Ran,
    Ready,
    Refused,
    Start,
    Stop,
    WireError,
    WorkerSettings,
)
from pipeboost.serving.worker_process import WorkerProcess

__all__ = ["Ran", "Supervisor", "WorkerSettings"]

_PAUSES = (0.2, 1.0, 5.0, 15.0, 30.0)
"""Seconds before a start after so many since the worker was ready last."""
_LOOK = 0.2
"""Seconds between two looks at whether the worker gets on."""


class _Running:
    """The job that the worker has."""

    def __init__(
        self, key: str, job_id: str, on_step: Callable[[str, int, int], None], on_preview: Callable[[Path], None]
    ) -> None:
        # A job may come twice, and what the worker says of the first time is not of the second.
        self.key, self.id = key, job_id
        self.on_step, self.on_preview = on_step, on_preview
        self.cancelled = False
        self.end: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()


class Supervisor:
    """One model's worker.

    Args:
        settings: what it loads.
        paths: where the jobs' folders are.
        step_timeout: seconds without a step or stage after which a running job's worker hangs, and without a sign of
            life any worker.
        start_timeout: seconds that loading and warming may take, and loading or compiling while a job runs.

    Attributes:
        card: what the worker last said of its model; None before the first time.
        ready: whether it takes jobs.
        restarts: how often it was started again.
        memory: bytes by what they are counted as.
    """

    def __init__(self, settings: WorkerSettings, paths: Paths, *, step_timeout: float, start_timeout: float) -> None:
        self.settings, self._paths = settings, paths
        self._step_timeout, self._start_timeout = step_timeout, start_timeout
        self.card: ModelCard | None = None
        self.restarts = 0
        self.memory: Mapping[str, int] = {}
        self._worker: WorkerProcess | None = None
        self._ready, self._stopping = asyncio.Event(), asyncio.Event()
        self._runs = self._failures = 0
        self._running: _Running | None = None
        self._waiting: dict[str, asyncio.Event] = {}
        self._advanced = self._stepped = 0.0  # signs that the job gets on, and those of them that are not excuses
        self._over = asyncio.Event()
        self._over.set()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and warm."""
        return self._ready.is_set()

    async def serve(self) -> None:
        """Keep a worker running until `stop`.

        The worker ends with the thread that this runs in, so that none is left where the process is killed.

        Raises:
            ConfigurationError: the worker refuses what it is to load, and never was ready.
        """
        self._over.clear()
        try:
            while not self._stopping.is_set():
                try:
                    reason = await self._live()
                except _NotLoadedError as error:
                    if self.card is None:
                        raise ConfigurationError(str(error)) from None
                    reason = str(error)
                self._lose(reason)
                if not self._stopping.is_set():
                    LOG.warning("%s; it is started again", reason)
                    self.restarts += 1
                    pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
                    self._failures += 1
                    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), pause)
        finally:
            self._stopping.set()
            self._lose("the server stops")
            self._over.set()

    async def run(
        self, job: Job, *, on_step: Callable[[str, int, int], None], on_preview: Callable[[Path], None]
    ) -> Ran:
        """Run a job once the worker is ready; one at a time.

        Args:
            on_step: called with the stage, and with steps of all outputs together, 0 of 0 where they are not known.
            on_preview: called with the array of a picture on the way.

        Raises:
            WorkerLost: the worker died or hung meanwhile.
            JobCancelled: `cancel` ended it.
            JobError: it cannot be run, or failed.
            Exception: what `on_step` or `on_preview` raised, which ends the job too.
        """
        assert self._running is None, "the worker has a job"
        dropped = self._waiting.setdefault(job.id, asyncio.Event())
        try:
            await _first(self._ready.wait(), dropped.wait(), self._stopping.wait())
        finally:
            del self._waiting[job.id]
        if dropped.is_set():
            raise JobCancelled("the job was cancelled")
        worker = self._worker
        if self._stopping.is_set() or worker is None:
            raise WorkerLost("the server stops")
        self._runs += 1
        running = self._running = _Running(f"{job.id} run {self._runs}", job.id, on_step, on_preview)
        self._advanced = self._stepped = time.monotonic()
        try:
            worker.send(Start(running.key, job.owner, job.kind, job.call, self._paths.of(job.id)))
        except WireError as error:  # before any of it was sent
            self._running = None
            raise JobError(REFUSED, str(error)) from error
        try:
            return await asyncio.shield(running.end)
        except asyncio.CancelledError:
            if not running.end.done():  # whoever waited has gone: the worker is free once the job has ended
                await self.cancel(job.id)
            raise
        finally:
            self._running = None
            if running.end.done() and not running.end.cancelled():
                running.end.exception()  # for which nobody may have waited

    async def cancel(self, job_id: str) -> None:
        """End a job at its next denoising step, or where it waits; return once it has ended. Harmless for others."""
        running = self._running
        if running is not None and running.id == job_id:
            if not running.cancelled and self._worker is not None:
                running.cancelled = True
                self._worker.send(Stop(running.key), rank=0)
            await asyncio.wait([running.end])
        elif job_id in self._waiting:
            self._waiting[job_id].set()

    async def stop(self) -> None:
        """End the worker, with the job that it has; afterwards none of its processes is left."""
        self._stopping.set()
        await self._over.wait()

    async def _live(self) -> str:
        """Start a worker and stay with it to its end; return what it ended of.

        Raises:
            _NotLoadedError: it refuses what it is to load.
        """
        worker = self._worker = WorkerProcess(self.settings, self._paths.data / "worker")
        looking = asyncio.create_task(self._look(worker))
        try:
            await worker.start(self._take)
            await _first(worker.ended(), looking, self._stopping.wait())
            if worker.refusal:
                raise _NotLoadedError(worker.refusal)
            return looking.result() if looking.done() else worker.death or "the server stops"
        finally:
            looking.cancel()
            await worker.kill()
            self._worker = None

    async def _look(self, worker: WorkerProcess) -> str:
        """Return what a worker hangs in, once it does."""
        looked = began = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK)
            now = time.monotonic()
            if now - looked > _LOOK + 1.0:  # this process stood still, and has not read what was sent
                self._advanced += now - looked
                self._stepped += now - looked
                began += now - looked
                worker.excuse(now - looked)
            looked = now
            silent = worker.silent_for(now, self._step_timeout)
            if silent is not None:
                return f"rank {silent} of the worker gave no sign of life for {self._step_timeout:g} s"
            if not self.ready and now - began > self._start_timeout:
                return f"the worker was not ready within {self._start_timeout:g} s"
            for since, most in ((self._advanced, self._step_timeout), (self._stepped, self._start_timeout)):
                if self._running is not None and now - since > max(most, self._step_timeout):
                    return f"the worker made no step for {max(most, self._step_timeout):g} s"

    def _take(self, message: Message) -> None:
        """Take what a rank says."""
        running, now = self._running, time.monotonic()
        if isinstance(message, Beat):
            if message.rank == 0:
                self.memory = dict(message.memory)
            if message.doing:
                self._advanced = now
        elif isinstance(message, Ready):
            self.card, self._failures = message.card, 0
            self._ready.set()
        elif isinstance(message, Refused):
            assert self._worker is not None
            self._worker.refusal = message.message
        elif running is None or not isinstance(message, (Advanced, Preview, Done, Failed)):
            return
        elif message.job == running.key and not running.end.done():
            self._advanced = self._stepped = now
            if isinstance(message, Failed) and message.last:
                self._ready.clear()  # before whoever waits for this one sends the next
            try:
                _follow(running, message)
            except Exception as error:  # of the callbacks, which `run` raises
                running.end.set_exception(error)
                assert self._worker is not None
                self._worker.send(Stop(running.key), rank=0)

    def _lose(self, reason: str) -> None:
        self._ready.clear()
        self.memory = {}
        if self._running is not None and not self._running.end.done():
            self._running.end.set_exception(
                JobCancelled("the job was cancelled") if self._running.cancelled else WorkerLost(reason)
            )


class _NotLoadedError(Exception):
    """The worker refuses what it is to load."""


def _follow(running: _Running, message: Advanced | Preview | Done | Failed) -> None:
    if isinstance(message, Advanced):
        running.on_step(message.stage, message.step, message.steps)
    elif isinstance(message, Preview):
        running.on_preview(message.file)
    elif isinstance(message, Done):
        running.end.set_result(message.ran)
    elif message.code == CANCELLED:
        running.end.set_exception(JobCancelled(message.message))
    elif message.code == WORKER_LOST:
        running.end.set_exception(WorkerLost(message.message))
    else:
        running.end.set_exception(JobError(message.code, message.message))


async def _first(*waits: Awaitable[object]) -> None:
    """Wait for the first of several; tasks that are given go on."""
    tasks = [asyncio.ensure_future(each) for each in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, given in zip(tasks, waits, strict=True):
            if task is not given:
                task.cancel()
