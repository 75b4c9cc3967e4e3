"""The worker's ends, by signals to real processes, and the server's own."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from pipeboost.core.errors import ConfigurationError
from pipeboost.serving.errors import JobCancelled, JobError, WorkerLost
from pipeboost.serving.jobs import Lora, Paths
from pipeboost.serving.supervisor import Supervisor, WorkerSettings
from pipeboost.serving.wire import Beat
from tests.serving.worker_support import DEMO, RANKS, Served, job, living, pixels, serving, wait_until, write_lora


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data")) as served:
        yield served


@pytest.fixture(scope="module")
def right(served) -> np.ndarray:
    return pixels(served.run(job("right")))


def lost(served: Served, each, reason: str, do) -> None:
    """Do something to the worker in the middle of a job, which is lost for this reason."""
    restarts, running = served.supervisor.restarts, served.begin(each)
    running.wait_for_step(1)
    do(served.group)
    with pytest.raises(WorkerLost, match=reason):
        running.future.result(60)
    assert wait_until(lambda: served.supervisor.restarts == restarts + 1)


def test_kill_9_loses_the_job_and_the_worker_is_started_again(served, right):
    lost(served, job("killed", steps=5000), "was killed by SIGKILL", lambda pid: os.kill(pid, signal.SIGKILL))
    assert not served.supervisor.ready
    assert np.array_equal(pixels(served.run(job("after death"))), right)


def test_a_stopped_worker_is_killed_and_started_again(served, right, monkeypatch):
    def stop(pid: int) -> None:
        monkeypatch.setattr(served.supervisor, "_step_timeout", 2.0)
        os.kill(pid, signal.SIGSTOP)

    lost(served, job("stopped", steps=5000), "no sign of life for 2 s", stop)
    monkeypatch.undo()
    assert np.array_equal(pixels(served.run(job("after stop"))), right)


@pytest.mark.exhaustive
def test_a_step_that_does_not_end_is_a_hang_of_a_process_that_lives(served, right, monkeypatch):
    running = served.begin(job("hung", steps=3, width=2048, height=2048))
    assert wait_until(lambda: any(stage == "timestep preparation" for stage, _, _ in running.steps), 60)
    monkeypatch.setattr(served.supervisor, "_step_timeout", 1.5)
    with pytest.raises(WorkerLost, match=r"made no step for 1\.5 s"):
        running.future.result(60)
    monkeypatch.undo()
    assert np.array_equal(pixels(served.run(job("after hang"))), right)


def test_loading_and_compiling_are_no_hang_but_not_for_ever(tmp_path):
    class Silent:
        def silent_for(self, now: float, most: float) -> None:
            return None

    async def watch() -> str:
        supervisor = Supervisor(DEMO, Paths(tmp_path), step_timeout=0.5, start_timeout=1.5)
        supervisor._ready.set()
        supervisor._running = object()
        supervisor._advanced = supervisor._stepped = time.monotonic()
        looking = asyncio.create_task(supervisor._look(Silent()))
        while not looking.done():
            supervisor._take(Beat(0, "compiling", {}))
            await asyncio.sleep(0.1)
        return looking.result()

    began = time.monotonic()
    assert asyncio.run(watch()) == "the worker made no step for 1.5 s"
    assert time.monotonic() - began > 1.4


@pytest.mark.exhaustive
def test_a_callback_that_raises_ends_the_job_with_what_it_raised(served, right):
    def fail(*step: object) -> None:
        raise OSError("no room")

    run = served.do(served.supervisor.run(job("full", steps=5000), on_step=fail, on_preview=fail))
    with pytest.raises(OSError, match="no room"):
        run.result(60)
    assert np.array_equal(pixels(served.run(job("after callback"))), right)


@pytest.mark.exhaustive
def test_a_job_is_cancelled_while_the_worker_loads(tmp_path):
    with serving(tmp_path) as served:
        running = served.begin(job("early"))
        assert wait_until(lambda: "early" in served.supervisor._waiting)
        served.cancel("early")
        with pytest.raises(JobCancelled):
            running.future.result(1)


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.5])
def test_a_server_that_stops_while_the_worker_starts_leaves_none(tmp_path, seconds):
    with serving(tmp_path) as served:
        time.sleep(seconds)
        served.close()
        assert living(tmp_path) == []
        assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_a_model_that_cannot_be_loaded_is_said_once(tmp_path):
    with serving(tmp_path, WorkerSettings(model_path=str(tmp_path / "none"))) as served:
        with pytest.raises(ConfigurationError, match="does not exist, and is no hub id"):
            served.serving.result(120)
        with pytest.raises(WorkerLost):
            served.run(job("never"))
        assert served.supervisor.restarts == 0


@pytest.mark.exhaustive
def test_a_start_that_takes_too_long_is_tried_again(tmp_path):
    with serving(tmp_path, start_timeout=0.5) as served:
        assert wait_until(lambda: served.supervisor.restarts >= 2, 60)
        assert not served.supervisor.ready


@pytest.mark.exhaustive
def test_warm_sizes_are_warm_before_the_worker_is_ready(tmp_path):
    settings = WorkerSettings(acceleration=DEMO.acceleration, warm_sizes=((64, 64), (100, 64)))
    with serving(tmp_path, settings) as served, pytest.raises(ConfigurationError, match="width=100 is not a multiple"):
        served.serving.result(120)


SERVER = """
    import asyncio, sys
    from pathlib import Path
    from pipeboost.serving.jobs import Call, Job, Paths
    from pipeboost.serving.supervisor import Supervisor
    from tests.serving.worker_support import DEMO, RANKS, job

    async def main():
        settings = RANKS if sys.argv[2] == "2" else DEMO
        supervisor = Supervisor(settings, Paths(Path(sys.argv[1])), step_timeout=60, start_timeout=200)
        serving = asyncio.create_task(supervisor.serve())
        step = lambda stage, step, steps: step == 2 and print("step", flush=True)
        await supervisor.run(job("orphan", steps=5000), on_step=step, on_preview=print)

    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("ranks", "stopped"),
    [
        pytest.param(1, True),
        pytest.param(1, False, marks=pytest.mark.exhaustive),
        pytest.param(2, True, marks=pytest.mark.exhaustive),
    ],
)
def test_kill_9_of_the_server_leaves_no_process_stopped_or_not(tmp_path, ranks, stopped):
    words = [sys.executable, "-c", textwrap.dedent(SERVER), str(tmp_path), str(ranks)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    ) as server:
        assert server.stdout.readline() == b"step\n"
        workers = [pid for pid in living(tmp_path) if pid != server.pid]
        assert len(workers) >= ranks
        for pid in workers if stopped else ():
            os.kill(pid, signal.SIGSTOP)
        server.kill()
    assert wait_until(lambda: living(tmp_path) == [], 20), living(tmp_path)


@pytest.mark.exhaustive
def test_two_ranks_run_cancel_die_and_stop(tmp_path):
    from pipeboost.generate import load_model

    with load_model(compile=None) as model:
        one = np.asarray(model.generate_image("a red star on the right", seed=1, num_inference_steps=2).image)
        write_lora(tmp_path, "ink", model.pipe.transformer, seed=0)
    settings = WorkerSettings(acceleration=RANKS.acceleration, ranks=2, lora_dir=str(tmp_path))
    with serving(tmp_path / "data", settings, step_timeout=20.0) as served:
        first = pixels(served.run(job("first", count=2)))
        assert np.abs(first.astype(int) - one).max() <= 1
        running = served.begin(job("long", steps=5000))
        running.wait_for_step(2)
        served.cancel("long")
        with pytest.raises(JobCancelled):
            running.future.result(0)
        assert np.array_equal(pixels(served.run(job("second", previews=1))), first)
        with pytest.raises(JobError, match="width=100"):
            served.run(job("bad", width=100))
        assert not np.array_equal(pixels(served.run(job("adapted", loras=(Lora("ink"),)))), first)
        assert np.array_equal(pixels(served.run(job("third"))), first)
        assert served.supervisor.restarts == 0
        before = resource.prlimit(served.supervisor._worker.pids[0], resource.RLIMIT_FSIZE)
        resource.prlimit(served.supervisor._worker.pids[0], resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(JobError, match="could not be written"):
            served.run(job("full", count=2))
        assert np.array_equal(pixels(served.run(job("after full"))), first)
        assert served.supervisor.restarts == 1

        def stop_second(pid: int) -> None:
            os.kill(served.supervisor._worker.pids[1], signal.SIGSTOP)

        lost(served, job("stopped", steps=5000), "no sign of life|cannot go on|has ended|exited", stop_second)
        assert np.array_equal(pixels(served.run(job("fourth"))), first)
