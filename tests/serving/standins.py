"""What stands in for the store and the worker where the HTTP side is tested: memory, and squares in one colour."""

import asyncio
import contextlib
import dataclasses
import io
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from pipeboost.serving.errors import IdempotencyError, JobCancelled, JobError, JobStateError, StorageError, WorkerLost
from pipeboost.serving.jobs import ENDED, Job, ModelCard, Paths
from pipeboost.serving.parts import Parts
from pipeboost.serving.server import Server
from pipeboost.serving.service import Service
from pipeboost.serving.settings import Settings

CARD = ModelCard(
    pipeline="SquarePipeline",
    kind="image",
    one_frame=False,
    parameters=("prompt", "negative_prompt", "width", "height", "num_inference_steps", "true_cfg_scale", "image"),
    size_multiple=16,
    width=64,
    height=32,
    num_frames=1,
    num_inference_steps=4,
    needs_image=False,
    several_images=True,
    takes_mask=True,
    quality="fast",
    plan="plan0",
    loras=True,
)
VIDEO = dataclasses.replace(
    CARD,
    kind="video",
    one_frame=True,
    num_frames=9,
    parameters=(*CARD.parameters, "num_frames"),
    fps=8,
    frame_multiple=4,
)


class MemoryStore:
    """Jobs in a dict; `broken` fails as a full disk does."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.jobs: dict[str, Job] = {}
        self.keys: dict[tuple[str, str], tuple[str, str]] = {}
        self.digests: dict[tuple[str, str], str] = {}
        self.broken = self.closed = False

    def _put(self, job_id: str, **changes: Any) -> Job:
        if self.broken:
            raise StorageError("/secret/folder cannot be written: No space left on device")
        self.jobs[job_id] = dataclasses.replace(self.jobs[job_id], **changes)
        return self.jobs[job_id]

    def create(self, job, *, files=None, idempotency="", digest=""):
        if idempotency and (job.owner, idempotency) in self.keys:
            known, theirs = self.keys[job.owner, idempotency]
            if theirs != digest:
                raise IdempotencyError("another request")
            return self.jobs[known]
        folder = self.paths.of(job.id)
        folder.mkdir(parents=True)
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        self.jobs[job.id] = job
        if idempotency:
            self.keys[job.owner, idempotency] = job.id, digest
        self.digests[job.owner, digest] = job.id
        return self._put(job.id)

    def find(self, owner, digest, *, since):
        job = self.jobs.get(self.digests.get((owner, digest), ""))
        return job if job and job.created >= since else None

    def get(self, job_id, owner=None):
        job = self.jobs.get(job_id)
        return job if job and owner in (None, job.owner) else None

    def listed(self, owner, *, kind=None, after="", limit=20, order="desc"):
        own = [job for job in self.jobs.values() if job.owner == owner and kind in (None, job.kind)]
        own = own[::-1] if order == "desc" else own
        if after:
            ids = [job.id for job in own]
            if after not in ids:
                raise JobStateError(f"after={after!r} is no job of yours")
            own = own[ids.index(after) + 1 :]
        return own[:limit], len(own) > limit

    def queued(self):
        return [job for job in self.jobs.values() if job.state == "queued"]

    def start(self, job_id):
        assert self.jobs[job_id].state == "queued"
        job = self.jobs[job_id]
        return self._put(job_id, state="in_progress", attempt=job.attempt + 1, started=time.time())

    def step(self, job_id, step, steps):
        self._put(job_id, step=step, steps=steps)

    def complete(self, job_id, result, expires):
        return self._end(job_id, state="completed", result=result, expires=expires)

    def fail(self, job_id, error, expires):
        return self._end(job_id, state="failed", error=error, expires=expires)

    def cancel(self, job_id, expires):
        return self._end(job_id, state="cancelled", expires=expires)

    def _end(self, job_id, **changes):
        assert self.jobs[job_id].state not in ENDED
        return self._put(job_id, ended=time.time(), **changes)

    def requeue(self, job_id, *, counted=True):
        return self._put(job_id, state="queued", attempt=self.jobs[job_id].attempt - (not counted))

    def upload(self, job_id, url):
        return self._put(job_id, upload=url)

    def delete(self, job_id):
        del self.jobs[job_id]

    def recover(self, *, expires=None):
        return []

    def check(self):
        return "/secret/folder is full" if self.broken else None

    def close(self):
        self.closed = True


class FifoOrder:
    """The earliest first; every job takes a second."""

    def __init__(self) -> None:
        self.learned: list[Job] = []

    def predict(self, call, card):
        return 1.0

    def learn(self, job):
        self.learned.append(job)

    def next(self, queued, now):
        return queued[0] if queued else None

    def spent(self, owner, seconds):
        pass

    def waiting(self, ahead, running, now):
        return float(len(ahead) + (running is not None))


@dataclasses.dataclass
class Ran:
    """What a call made."""

    arrays: tuple[Path, ...]
    seeds: tuple[int, ...]
    plan: str = "plan0"
    steps: int = 4
    seconds: float = 0.25
    stages: Any = dataclasses.field(default_factory=lambda: {"denoise": 0.2, "decode": 0.05})
    fps: float | None = None
    notes: tuple[str, ...] = ("a note",)


class SquareWorker:
    """Makes squares whose colour is the seed; the prompt says what else is to happen.

    Attributes:
        pause: seconds of a step.
        ran: the jobs that it was given, in order.
    """

    def __init__(self, paths: Paths, card: ModelCard | None = CARD) -> None:
        self.paths, self.card, self.ready = paths, card, True
        self.restarts, self.memory, self.pause = 0, {"allocated": 1024}, 0.0
        self.ran: list[Job] = []
        self.cancelled: list[str] = []
        self.losses = 0
        self.stopped = asyncio.Event()

    async def serve(self):
        await self.stopped.wait()

    async def stop(self):
        self.stopped.set()

    async def cancel(self, job_id):
        self.cancelled.append(job_id)

    async def run(self, job, *, on_step, on_preview):
        self.ran.append(job)
        folder = self.paths.of(job.id)
        call, card = job.call, self.card
        if call.prompt == "fail":
            raise JobError("out_of_memory", "the worker ran out of memory")
        if call.prompt == "bug":
            raise RuntimeError(f"{folder} {call.prompt}")
        if call.prompt == "lose" and self.losses:
            self.losses -= 1
            raise WorkerLost("it died")
        steps = call.num_inference_steps or card.num_inference_steps
        size = (call.height or card.height, call.width or card.width, 3)
        for step in range(1, steps + 1):
            await asyncio.sleep(5 if call.prompt == "forever" and job.id not in self.cancelled else self.pause)
            for _ in range(500):
                if call.prompt != "slow" or job.id in self.cancelled:
                    break
                await asyncio.sleep(0.01)
            if job.id in self.cancelled:
                raise JobCancelled("cancelled")
            on_step("denoise", step, steps)
            if call.previews and step <= call.previews:
                path = folder / f"preview_{step}.npy"
                np.save(path, np.full(size, step, np.uint8))
                on_preview(path)
        arrays, seeds = [], []
        frames = (call.num_frames,) if job.kind == "video" else (1,) if call.num_frames else ()
        for number in range(call.count):
            path = folder / f"array_{number}.npy"
            np.save(path, np.full((*frames, *size), (call.seed + number) % 256, np.uint8))
            arrays.append(path)
            seeds.append(call.seed + number)
        return Ran(tuple(arrays), tuple(seeds), steps=steps)


class PlainMedia:
    """PIL's encoders, and videos that are only their frames' numbers."""

    def encode_image(self, pixels, format, compression):
        buffer = io.BytesIO()
        lossy = {"quality": 100 if compression is None else compression} if format != "png" else {}
        Image.fromarray(np.asarray(pixels)).save(buffer, format, **lossy)
        return buffer.getvalue()

    def encode_video(self, frames, fps, path):
        path.write_bytes(f"{len(frames)} frames, {fps} fps, {frames.shape}".encode().ljust(1000, b"."))

    def thumbnail(self, frames):
        return self.encode_image(frames[0], "webp", None)

    def spritesheet(self, frames):
        return self.encode_image(np.concatenate(list(frames), axis=1), "jpeg", None)


@dataclasses.dataclass
class Running:
    """A server that runs in a thread of this process."""

    url: str
    service: Service
    store: MemoryStore
    worker: SquareWorker
    server: uvicorn.Server
    thread: threading.Thread

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def service_of(folder: Path, card: ModelCard | None = CARD, **settings: Any) -> Service:
    """A service of stand-ins."""
    paths = Paths(folder)
    numbers = itertools.count()
    parts = Parts(
        store=MemoryStore(paths),
        order=FifoOrder(),
        worker=SquareWorker(paths, card),
        media=PlainMedia(),
        new_id=lambda kind: f"{kind}_{next(numbers)}{secrets.token_hex(8)}",
    )
    return Service(parts, Settings(data_dir=folder, **settings), paths)


@contextlib.contextmanager
def serving(
    folder: Path, card: ModelCard | None = CARD, *, heartbeat: float = 15.0, **settings: Any
) -> Iterator[Running]:
    """A server of stand-ins on a free port, in a thread."""
    started: list[Service] = []
    port = socket.create_server(("127.0.0.1", 0))
    ready = threading.Event()
    failed: list[BaseException] = []

    async def run() -> None:
        service = service_of(folder, card, **settings)
        started.append(service)
        server = Server(service, service.settings, heartbeat=heartbeat)
        servers.append(server)
        ready.set()
        await server.serve(sockets=[port])

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)
            ready.set()
            raise

    servers: list[uvicorn.Server] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(20)
    if failed:
        raise failed[0]
    end = time.monotonic() + 20
    while not servers[0].started and time.monotonic() < end:
        time.sleep(0.005)
    service: Any = started[0]
    url = f"http://127.0.0.1:{port.getsockname()[1]}"
    running = Running(url, service, service.parts.store, service.parts.worker, servers[0], thread)
    try:
        yield running
    finally:
        running.stop()
