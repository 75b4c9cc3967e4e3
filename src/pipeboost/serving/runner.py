"""Runs jobs one after the other: which is next, what ends it early, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from pipeboost.serving import jobs
from pipeboost.serving.errors import JobCancelled, JobError, Unavailable, WorkerLost
from pipeboost.serving.feed import Event
from pipeboost.serving.finishing import finished
from pipeboost.serving.jobs import Error, Job
from pipeboost.serving.logs import LOG
from pipeboost.serving.parts import Ran

if TYPE_CHECKING:
    from pipeboost.serving.service import Service

P = ParamSpec("P")
T = TypeVar("T")
_TRIES = 2
_RESULTS = 2
"""Jobs whose results may be encoded while the worker runs the next one."""
_TICK = 1.0
_ENDING = 10.0
"""Seconds that a worker has to end a job when the server stops."""

End = Literal["cancel", "deadline", "drain"]


@dataclass
class _Running:
    """The job that the worker has.

    Attributes:
        end: why it is to end early.
        previews: pictures of steps that it has sent.
    """

    job: Job
    end: End | None = None
    previews: int = 0


class Runner:
    """The loop of a service.

    Attributes:
        draining: only jobs that somebody waits for are begun.
        closed: none are begun.
        choosing: held while a queued job is begun or cancelled, so that it is one or the other.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.draining = False
        self.closed = False
        self.choosing = asyncio.Lock()
        self._running: _Running | None = None
        self._finishing: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(_RESULTS)
        self._wake = asyncio.Event()

    @property
    def job(self) -> Job | None:
        """The job that the worker has; None while it has none."""
        return None if self._running is None else self._running.job

    def wake(self) -> None:
        """Look for a job at once."""
        self._wake.set()

    async def serve(self) -> None:
        """Run jobs until it is cancelled."""
        while True:
            if (job := await self._next()) is not None:
                await self._run(job)
                continue
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), _TICK)
            except asyncio.TimeoutError:
                continue

    async def _next(self) -> Job | None:
        """Begin a job, if there is one and the worker can take it."""
        service = self.service
        if self.closed or not service.parts.worker.ready:
            return None
        async with self.choosing:
            queued = await self._not_late()
            if self.draining:
                queued = [job for job in queued if service.feed.followers(job.id)]
            job = service.parts.order.next(queued, service.clock())
            if job is None:
                return None
            job = await service.store(service.parts.store.start, job.id)
            self._running = _Running(job)
        return job

    async def _run(self, job: Job) -> None:
        running = self._running
        assert running is not None
        service, start = self.service, self.service.clock()

        def on_step(stage: str, step: int, steps: int) -> None:
            service.parts.store.step(job.id, step, steps)
            running.job = replace(running.job, step=step, steps=steps)
            service.feed.tell(Event("step", running.job))

        def on_preview(picture: Path) -> None:
            service.feed.tell(Event("preview", running.job, picture, running.previews))
            running.previews += 1

        left = None if job.deadline is None else job.deadline - start
        timer = None if left is None else asyncio.create_task(self._end_in(left, job.id))
        try:
            ran = await service.parts.worker.run(job, on_step=on_step, on_preview=on_preview)
        except (JobError, JobCancelled, WorkerLost) as error:
            await self._failed(running, error)
        except Exception as error:
            LOG.exception("job %s failed inside the server", job.id)
            await self._failed(running, error)
        else:
            await self._room.acquire()
            task = asyncio.create_task(self._finish(job, ran))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        finally:
            if timer is not None:
                timer.cancel()
            self._running = None
            service.parts.order.spent(job.owner, service.clock() - start)

    async def _end_in(self, seconds: float, job_id: str) -> None:
        await asyncio.sleep(seconds)
        await self.end(job_id, "deadline")

    async def end(self, job_id: str, why: End) -> None:
        """Have the worker end a job, if it is the one that runs; the first reason stands."""
        running = self._running
        if running is not None and running.job.id == job_id:
            running.end = running.end or why
            await self.service.parts.worker.cancel(job_id)

    async def _failed(self, running: _Running, error: Exception) -> None:
        """Settle a job that has no result; under the lock, so that a cancellation comes before that or after."""
        service, job = self.service, running.job
        store, expires = service.parts.store, service.expiry()
        early = isinstance(error, (JobCancelled, WorkerLost))
        async with self.choosing:
            if early and running.end == "deadline":
                done = await self._surely(store.fail, job.id, _late(job), expires)
            elif early and running.end == "cancel":
                done = await self._surely(store.cancel, job.id, expires)
            elif early and (running.end == "drain" or job.attempt < _TRIES):
                await self._surely(store.requeue, job.id, counted=isinstance(error, WorkerLost))
                return
            elif isinstance(error, WorkerLost):
                lost = Error(jobs.WORKER_LOST, f"the worker was lost {job.attempt} times while it ran this")
                done = await self._surely(store.fail, job.id, lost, expires)
            elif isinstance(error, JobError):
                done = await self._surely(store.fail, job.id, Error(error.code, error.message), expires)
            else:
                failed = Error(jobs.FAILED, "the server failed to run this")
                done = await self._surely(store.fail, job.id, failed, expires)
        service.ended(done)

    async def _surely(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the store that says what became of a job, again and again while the disk is full."""
        while True:
            try:
                return await self.service.store(function, *args, **kwargs)
            except Unavailable:
                await asyncio.sleep(_TICK)

    async def _finish(self, job: Job, ran: Ran) -> None:
        """Encode, store and complete a job while the worker runs the next one."""
        service, card = self.service, self.service.parts.worker.card
        parts, target = service.parts, service.settings.upload
        try:
            fps = float(card.fps if card else 16)
            result = await asyncio.to_thread(finished, job, ran, parts.media, service.paths, fps)
            if parts.upload is not None and target:
                files = [service.paths.of(job.id) / name for name in result.files]
                urls = await asyncio.to_thread(parts.upload, f"{target.rstrip('/')}/{job.id}", files)
                await service.store(parts.store.upload, job.id, urls[0])
            done = await self._surely(parts.store.complete, job.id, result, service.expiry())
        except Exception:
            LOG.exception("the results of job %s cannot be kept", job.id)
            lost = Error(jobs.FAILED, "the results could not be written or uploaded")
            done = await self._surely(parts.store.fail, job.id, lost, service.expiry())
        else:
            parts.order.learn(done)
        finally:
            self._room.release()
        service.ended(done)

    async def expire(self) -> None:
        """End the queued jobs whose deadline has passed."""
        async with self.choosing:
            await self._not_late()

    async def _not_late(self) -> list[Job]:
        """End the queued jobs whose deadline has passed, and return the others."""
        service, now = self.service, self.service.clock()
        queued = await service.store(service.parts.store.queued)
        late = [job for job in queued if job.deadline is not None and job.deadline <= now]
        for job in late:
            service.ended(await service.store(service.parts.store.fail, job.id, _late(job), service.expiry()))
        return [job for job in queued if job not in late]

    async def drain(self, timeout: float) -> None:
        """Run what somebody waits for, for at most `timeout` seconds; what runs then is queued again."""
        self.draining = True
        self.wake()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._quiet(), timeout)
        self.closed = True
        if (job := self.job) is not None:
            await self.end(job.id, "drain")
        try:
            # What is being written is written to its end; a worker that hangs is not waited for.
            await asyncio.wait_for(self._until(lambda: self._running is None and not self._finishing), _ENDING)
        except asyncio.TimeoutError:
            LOG.warning("the worker does not end its job; it is run again when the server is started")

    async def _quiet(self) -> None:
        service = self.service
        while True:
            await self._until(lambda: self._running is None and not self._finishing)
            queued = await service.store(service.parts.store.queued)
            if not any(service.feed.followers(job.id) for job in queued):
                return
            await asyncio.sleep(0.05)

    @staticmethod
    async def _until(quiet: Callable[[], bool]) -> None:
        while not quiet():
            await asyncio.sleep(0.02)


def _late(job: Job) -> Error:
    seconds = (job.deadline or 0.0) - job.created
    return Error(jobs.DEADLINE, f"it was not done within {seconds:.0f} s of being accepted")
