"""What the tests of the worker share: a supervisor in a thread, and its real processes."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from pipeboost.serving.jobs import Call, Job, Paths
from pipeboost.serving.supervisor import Ran, Supervisor, WorkerSettings
from tests.pipelines.tiny_adapters import lora_state_dict

DEMO = WorkerSettings(acceleration={"compile": "off"})
RANKS = WorkerSettings(acceleration={"compile": "off", "parallel": {"ulysses": 2}}, ranks=2)
PROMPT = "a red star on the right"


def job(name: str, *, steps: int | None = 2, owner: str = "o", kind: str = "image", **call: Any) -> Job:
    """A job of the demo model."""
    asked = Call(call.pop("prompt", PROMPT), call.pop("seed", 1), num_inference_steps=steps, **call)
    return Job(name, owner, kind, asked, {}, "queued", created=0.0, cost=0.0)


@dataclass
class Running:
    """A job that runs in the supervisor's thread."""

    future: Future[Ran] = field(default_factory=Future)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    previews: list[Path] = field(default_factory=list)

    def wait_for_step(self, step: int, within: float = 120.0) -> None:
        """Wait until so many steps are done."""
        until = time.monotonic() + within
        while not any(each[1] >= step for each in self.steps):
            assert time.monotonic() < until, f"no step {step} within {within} s: {self.steps[-3:]}"
            assert not self.future.done(), self.future
            time.sleep(0.01)


class Served:
    """A supervisor whose loop runs in a thread."""

    def __init__(self, data: Path, settings: WorkerSettings = DEMO, **timeouts: float) -> None:
        timeouts = {"step_timeout": 60.0, "start_timeout": 240.0, **timeouts}
        self.paths = Paths(data)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="supervisor")
        self._thread.start()
        self.supervisor = Supervisor(settings, self.paths, **timeouts)
        self.serving = self.do(self.supervisor.serve())

    def do(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def begin(self, each: Job) -> Running:
        running = Running()
        running.future = self.do(
            self.supervisor.run(
                each, on_step=lambda *step: running.steps.append(step), on_preview=running.previews.append
            )
        )
        return running

    def run(self, each: Job) -> Ran:
        return self.begin(each).future.result(240)

    def cancel(self, name: str) -> None:
        self.do(self.supervisor.cancel(name)).result(120)

    @property
    def group(self) -> int:
        """The worker's process group, which is its first process too."""
        return self.supervisor._worker._process.pid

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self.do(self.supervisor.stop()).result(60)
        with contextlib.suppress(Exception):
            self.serving.result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def serving(data: Path, settings: WorkerSettings = DEMO, **timeouts: float) -> Iterator[Served]:
    """A supervisor that is stopped at the end, when no process of it may be left."""
    served = Served(data, settings, **timeouts)
    try:
        yield served
    finally:
        served.close()
        assert living(data) == []


def living(data: Path) -> list[int]:
    """Processes that were started for a folder, whoever their parents are now, and what these have started."""
    return [
        pid
        for pid in map(int, filter(str.isdigit, (each.name for each in Path("/proc").iterdir())))
        if _is_of(pid, data)
    ]


def _is_of(pid: int, data: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
        leader = Path(f"/proc/{group}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return state not in "ZX" and "serving.worker" in f"{words}{leader}" and str(data) in f"{words}{leader}"


def wait_until(holds: Callable[[], bool], within: float = 30.0) -> bool:
    """Whether something comes true within a time."""
    until = time.monotonic() + within
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def pixels(ran: Ran, index: int = 0) -> np.ndarray:
    return np.load(ran.arrays[index], allow_pickle=False)


def of(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def write_lora(folder: Path, name: str, model: Any, *, seed: int, rank: int = 2) -> Path:
    """An adapter of random weights for a transformer, as a file."""
    path = folder / f"{name}.safetensors"
    save_file(lora_state_dict(model, rank=rank, seed=seed), path)
    return path
