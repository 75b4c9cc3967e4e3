"""The service: takes jobs, hands them to the runner, and says what becomes of each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from pipeboost.core.errors import ConfigurationError
from pipeboost.serving.errors import Busy, StorageError, Unavailable
from pipeboost.serving.feed import Event, Feed
from pipeboost.serving.jobs import ENDED, Call, Job, Kind, Paths
from pipeboost.serving.logs import LOG
from pipeboost.serving.parts import Parts
from pipeboost.serving.runner import Runner
from pipeboost.serving.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")
_CLEANING = 60.0


class Service:
    """One model, one worker, jobs in turn.

    Attributes:
        on_end: receive each job that has ended.
        failure: what has ended the server; None while it runs.
        on_failure: called when there is one.
        fault: why jobs cannot be kept or run now; empty while they can.
    """

    def __init__(
        self, parts: Parts, settings: Settings, paths: Paths, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.parts, self.settings, self.paths, self.clock = parts, settings, paths, clock
        self.feed = Feed()
        self.runner = Runner(self)
        self.on_end: list[Callable[[Job], None]] = []
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.fault = ""
        self._stopping = False
        self._closed = False
        self._leaving: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = ThreadPoolExecutor(1, "store")

    async def store(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the store on its own thread.

        Raises:
            Unavailable: the disk or the database fails.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))
        except StorageError as error:
            self.fault = str(error)
            LOG.error("%s", error)
            raise Unavailable("the server cannot keep jobs now, for its disk or its database fails") from error
        self.fault = ""
        return found

    @property
    def ready(self) -> bool:
        """Whether a job that comes now is run."""
        return self.parts.worker.ready and not (self.runner.draining or self._stopping or self.fault)

    def expiry(self) -> float:
        """Return when what ends now is deleted."""
        return self.clock() + self.settings.retention

    async def start(self) -> None:
        """Take up what an earlier server left, and begin to run jobs."""
        for job in await self.store(self.parts.store.recover, expires=self.expiry()):
            LOG.info("job %s of an earlier server is %s", job.id, job.state)
        for work in (self.parts.worker.serve, self.runner.serve, self._keep_house):
            self._tasks.append(asyncio.create_task(self._watched(work)))

    async def _watched(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run what runs as long as the server; if it fails, that is in the log, and the server takes no more jobs."""
        while not self._stopping:
            try:
                return await work()
            except Unavailable:  # as long as the disk is full
                await asyncio.sleep(1.0)
            except Exception as error:
                if not isinstance(error, ConfigurationError):
                    LOG.exception("%s failed", work.__qualname__)
                self.failure, self._stopping = error, True
                self.fault = "the server has failed, and has to be started again"
                self.feed.close()
                self.on_failure()

    async def _keep_house(self) -> None:
        cleaned = 0.0
        while True:
            await self.runner.expire()
            if self.clock() - cleaned > _CLEANING:
                cleaned = self.clock()
                await self.store(self.parts.clean)
            await asyncio.sleep(1.0)

    async def submit(
        self,
        *,
        owner: str,
        kind: Kind,
        call: Call,
        wire: Mapping[str, Any],
        files: Mapping[str, bytes],
        idempotency: str = "",
        digest: str = "",
        retried: bool = False,
        deadline: float | None = None,
    ) -> Job:
        """Take a job.

        Args:
            files: contents of `call.images` and `call.mask`.
            idempotency: key of the client; the same one stands for the same job.
            digest: of the whole request.
            retried: whether the client says that it has sent the request before.

        Raises:
            Busy: too many wait, or it would wait for too long.
            Unavailable: the server stops, loads its model, or cannot keep jobs.
            IdempotencyError: the key came with another request.
        """
        now = self.clock()
        if retried and not idempotency:
            earlier = await self.store(self.parts.store.find, owner, digest, since=now - self.settings.timeout)
            if earlier is not None and earlier.state not in ("failed", "cancelled"):
                return earlier
        if self.runner.draining or self._stopping:
            raise Unavailable("the server is stopping")
        if (card := self.parts.worker.card) is None:
            raise Unavailable("the model is being loaded")
        if not idempotency:
            await self._check_room(owner, now)
        job = Job(
            id=self.parts.new_id(kind),
            owner=owner,
            kind=kind,
            call=call,
            wire=wire,
            state="queued",
            created=now,
            cost=self.parts.order.predict(call, card),
            deadline=min(deadline or float("inf"), now + self.settings.timeout),
        )
        create = self.parts.store.create
        kept = await self.store(create, job, files=files, idempotency=idempotency, digest=digest)
        if idempotency and kept.id == job.id:
            try:
                await self._check_room(owner, now, besides=job.id)
            except Busy:
                await self.delete(job.id)
                raise
        self.runner.wake()
        return kept

    async def _check_room(self, owner: str, now: float, besides: str = "") -> None:
        queued = [job for job in await self.store(self.parts.store.queued) if job.id != besides]
        wait = self.parts.order.waiting(queued, self.runner.job, now)
        own = sum(job.owner == owner for job in queued)
        if len(queued) >= self.settings.max_queue:
            raise Busy(f"{len(queued)} requests are waiting, which is the server's limit", wait)
        if own >= self.settings.max_queue_per_key:
            raise Busy(f"{own} requests of this key are waiting, which is its limit", wait)
        if wait > self.settings.max_wait:
            raise Busy(f"a request would wait for {wait:.0f} s, longer than the limit", wait - self.settings.max_wait)

    async def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """Return a job as it is now; None where there is none, or it is another owner's."""
        return await self.store(self.parts.store.get, job_id, owner)

    async def listed(self, owner: str, **page: Any) -> tuple[list[Job], bool]:
        """Return a page of an owner's jobs, as `JobStore.listed` does, and whether there are more."""
        return await self.store(self.parts.store.listed, owner, **page)

    async def queued(self) -> list[Job]:
        """Return the jobs that wait."""
        return await self.store(self.parts.store.queued)

    async def cancel(self, job_id: str) -> Job:
        """End a job, and return it when it has ended; one that has ended already stays as it is.

        Raises:
            KeyError: there is none.
            Unavailable: the server stops.
        """
        async with self.runner.choosing:
            if (job := await self.get(job_id)) is None:
                raise KeyError(job_id)
            if job.state == "queued":
                job = await self.store(self.parts.store.cancel, job_id, self.expiry())
                self.ended(job)
        if job.state not in ENDED:
            await self.runner.end(job_id, "cancel")
            job = await self.wait(job_id)
        return job

    async def delete(self, job_id: str) -> None:
        """Cancel a job where it has not ended, and delete all of it.

        Raises:
            KeyError: there is none.
        """
        await self.cancel(job_id)
        await self.store(self.parts.store.delete, job_id)

    def abandon(self, job_id: str) -> None:
        """Cancel a job unless somebody waits for it; at once, but after what called this."""

        async def abandoned() -> None:
            try:
                if not self.feed.followers(job_id):
                    await self.cancel(job_id)
            except (KeyError, Unavailable) as error:
                LOG.info("job %s was not cancelled: %s", job_id, type(error).__name__)

        task = asyncio.create_task(abandoned())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def wait(self, job_id: str) -> Job:
        """Return a job when it has ended.

        Raises:
            Unavailable: the server stops before that; it takes the job up when it is started again.
        """
        async with contextlib.aclosing(self.events(job_id)) as events:
            async for event in events:
                if event.kind == "ended":
                    return event.job
        raise Unavailable(f"the server is stopping; {job_id} is run when it is started again")

    def events(self, job_id: str, silence: float | None = None) -> AsyncGenerator[Event, None]:
        """Yield what happens to a job, as `Feed.follow` does."""
        return self.feed.follow(job_id, self.get, silence)

    def ended(self, job: Job) -> None:
        """Tell of a job that it has ended."""
        self.feed.tell(Event("ended", job))
        for tell in self.on_end:
            tell(job)

    async def drain(self, timeout: float) -> None:
        """Stop: take no more jobs, run what somebody waits for, then queue what runs again and end the worker."""
        if self._closed:
            return
        self._closed = True
        await self.runner.drain(timeout)
        self._stopping = True
        self.feed.close()
        for task in self._tasks:
            task.cancel()
        await self.parts.worker.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self._thread, self.parts.store.close)
        self._thread.shutdown()
