"""What happens to jobs, for whoever follows them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeboost.serving.jobs import ENDED, Job


@dataclass(frozen=True)
class Event:
    """A step of a job, a picture of a step, its end, or that nothing has happened for a while.

    Attributes:
        picture: an array of uint8, (height, width, channels), as `.npy`.
        index: number of the picture.
    """

    kind: Literal["step", "preview", "ended", "silence", "stopped"]
    job: Job
    picture: Path | None = None
    index: int = 0


class Feed:
    """Those who follow jobs, by the job's id."""

    def __init__(self) -> None:
        self._followers: dict[str, set[asyncio.Queue[Event]]] = {}
        self._closed = False

    def tell(self, event: Event) -> None:
        """Give an event to all who follow its job."""
        for queue in self._followers.get(event.job.id, ()):
            queue.put_nowait(event)

    def close(self) -> None:
        """End all iterators."""
        self._closed = True
        for queues in self._followers.values():
            for queue in queues:
                queue.put_nowait(Event("stopped", _NOBODYS))

    def followers(self, job_id: str) -> int:
        """Return how many follow a job."""
        return len(self._followers.get(job_id, ()))

    async def follow(
        self, job_id: str, get: Callable[[str], Awaitable[Job | None]], silence: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield what happens to a job until it has ended; nothing if there is none.

        Args:
            get: returns the job as it is now.
            silence: seconds after which an event says that nothing has happened.
        """
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._followers.setdefault(job_id, set()).add(queue)  # before the job is looked at, so that no end is missed
        try:
            if (job := await get(job_id)) is None:
                return
            if job.state in ENDED:
                yield Event("ended", job)
                return
            while not self._closed or not queue.empty():
                try:
                    event = await asyncio.wait_for(queue.get(), silence)
                except asyncio.TimeoutError:
                    yield Event("silence", job)
                    continue
                if event.kind == "stopped":
                    return
                job = event.job
                yield event
                if event.kind == "ended":
                    return
        finally:
            followers = self._followers[job_id]
            followers.discard(queue)
            if not followers:
                del self._followers[job_id]


_NOBODYS = Job("", "", "image", None, {}, "queued", 0.0, 0.0)  # type: ignore[arg-type]
