"""What becomes of jobs: lost workers, deadlines, full queues and disks, and a server that stops."""

import asyncio
import contextlib
import time

import httpx
import pytest

from pipeboost.serving.errors import Busy, IdempotencyError, Unavailable
from pipeboost.serving.jobs import Call
from tests.serving.standins import service_of, serving


async def submitted(service, prompt="x", owner="", **settings):
    call = Call(prompt=prompt, seed=1, num_inference_steps=settings.pop("steps", 2))
    wire = {"output_format": "png", "output_compression": None}
    return await service.submit(owner=owner, kind="image", call=call, wire=wire, files={}, **settings)


def run(work, tmp_path, **settings):
    """Run a coroutine function with a service that is stopped afterwards."""

    async def inside():
        service = service_of(tmp_path, **settings)
        await service.start()
        try:
            return await asyncio.wait_for(work(service), 20)
        finally:
            service.parts.store.broken = False
            await service.drain(0.1)

    return asyncio.run(inside())


@pytest.mark.parametrize(("losses", "state", "attempts"), [(1, "completed", 2), (2, "failed", 2)])
def test_a_job_whose_worker_is_lost_runs_again_once(tmp_path, losses, state, attempts):
    async def work(service):
        service.parts.worker.losses = losses
        job = await service.wait((await submitted(service, "lose")).id)
        assert (job.state, job.attempt) == (state, attempts)
        assert job.error is None or job.error.code == "worker_lost"
        assert (await service.wait((await submitted(service)).id)).state == "completed"

    run(work, tmp_path)


def test_a_job_that_is_too_late_fails_while_it_runs_and_while_it_waits(tmp_path):
    async def work(service):
        running = await submitted(service, "slow", steps=50)
        late = await submitted(service, deadline=time.time() + 0.1)
        ended = [await service.wait(job.id) for job in (running, late)]
        assert [job.error.code for job in ended] == ["deadline_exceeded"] * 2
        assert [job.attempt for job in ended] == [1, 0]
        assert (await service.wait((await submitted(service)).id)).state == "completed"

    run(work, tmp_path, timeout=0.5)


def test_too_many_or_too_long_a_wait_is_refused_with_a_time(tmp_path):
    async def work(service):
        service.parts.worker.ready = False
        await submitted(service, owner="a")
        with pytest.raises(Busy, match="1 requests of this key are waiting"):
            await submitted(service, owner="a")
        await submitted(service, owner="b")
        with pytest.raises(Busy, match="2 requests are waiting"):
            await submitted(service, owner="c")
        with pytest.raises(Busy):
            await submitted(service, owner="c", idempotency="key")
        assert len(service.parts.store.jobs) == 2
        service.parts.worker.ready = True

    run(work, tmp_path, max_queue=2, max_queue_per_key=1)

    async def wait(service):
        service.parts.worker.ready = False
        await submitted(service)
        await submitted(service)
        with pytest.raises(Busy, match="would wait for 2 s") as refused:
            await submitted(service)
        assert refused.value.retry_after == pytest.approx(0.5)

    run(wait, tmp_path / "second", max_wait=1.5)


def test_a_key_stands_for_one_job_and_another_request_with_it_is_refused(tmp_path):
    async def work(service):
        first = await submitted(service, idempotency="key", digest="one")
        assert (await submitted(service, idempotency="key", digest="one")).id == first.id
        assert (await submitted(service, idempotency="key", digest="one", owner="b")).id != first.id
        with pytest.raises(IdempotencyError):
            await submitted(service, idempotency="key", digest="two")

    run(work, tmp_path)


def test_a_full_disk_refuses_jobs_and_what_runs_is_settled_when_there_is_room(tmp_path, monkeypatch):
    async def work(service):
        service.parts.worker.pause = 0.05
        job = await submitted(service, steps=4)
        while service.runner.job is None:
            await asyncio.sleep(0.01)
        service.parts.store.step = lambda *_: None
        service.parts.store.broken = True
        with pytest.raises(Unavailable) as refused:
            await submitted(service)
        assert "secret" not in str(refused.value)
        assert not service.ready
        await asyncio.sleep(0.4)
        assert service.parts.store.jobs[job.id].state == "in_progress"
        service.parts.store.broken = False
        assert (await service.wait(job.id)).state == "completed"
        assert service.ready

    run(work, tmp_path)


def test_a_server_that_stops_finishes_what_somebody_waits_for_and_keeps_the_rest(tmp_path):
    async def work():
        service = service_of(tmp_path)
        await service.start()
        service.parts.worker.pause = 0.05
        running, awaited, nobodys = [await submitted(service, steps=4) for _ in range(3)]
        waiting = [asyncio.create_task(service.wait(job.id)) for job in (running, awaited)]
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(service.drain(10))
        await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="stopping"):
            await submitted(service)
        await draining
        assert [(await job).state for job in waiting] == ["completed"] * 2
        kept = service.parts.store.jobs[nobodys.id]
        assert (kept.state, kept.attempt, service.parts.store.closed) == ("queued", 0, True)

    asyncio.run(asyncio.wait_for(work(), 20))


def test_what_does_not_end_in_time_is_queued_again_and_those_who_wait_are_told(tmp_path):
    async def work():
        service = service_of(tmp_path)
        await service.start()
        job = await submitted(service, "slow", steps=50)
        waiting = asyncio.create_task(service.wait(job.id))
        while service.runner.job is None:
            await asyncio.sleep(0.01)
        await service.drain(0.1)
        with pytest.raises(Unavailable, match="is run when it is started again"):
            await waiting
        kept = service.parts.store.jobs[job.id]
        assert (kept.state, kept.attempt, len(service.parts.worker.ran)) == ("queued", 0, 1)

    asyncio.run(asyncio.wait_for(work(), 20))


def test_cancelling_what_waits_takes_it_out_and_what_has_ended_stays(tmp_path):
    async def work(service):
        service.parts.worker.ready = False
        job = await submitted(service)
        assert (await service.cancel(job.id)).state == "cancelled"
        service.parts.worker.ready = True
        done = await service.wait((await submitted(service)).id)
        assert await service.cancel(done.id) == done
        assert len(service.parts.worker.ran) == 1
        with pytest.raises(KeyError):
            await service.cancel("img_unknown")

    run(work, tmp_path)


def test_many_jobs_that_are_cancelled_at_random_all_end_once(tmp_path):
    async def work(service):
        jobs = [await submitted(service, "slow" if number % 6 == 0 else "x", steps=2) for number in range(30)]
        ended = []
        service.on_end.append(ended.append)

        async def cancel(number, job):
            await asyncio.sleep(0.01 * number)
            with contextlib.suppress(KeyError):
                await service.cancel(job.id)

        cancels = [cancel(number, job) for number, job in enumerate(jobs) if number % 2 == 0]
        states, *_ = await asyncio.gather(asyncio.gather(*(service.wait(job.id) for job in jobs)), *cancels)
        assert sorted(job.id for job in ended) == sorted(job.id for job in jobs)
        assert {job.state for job in states} <= {"completed", "cancelled"}
        assert not service.feed._followers

    run(work, tmp_path, max_queue=40)


def test_without_a_model_requests_are_told_to_come_again(tmp_path):
    with serving(tmp_path, card=None) as server:
        answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        server.worker.ready = False
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the model is being loaded")
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_failing_disk_is_one_clear_error_and_not_ready(tmp_path):
    with serving(tmp_path) as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        server.store.broken = True
        answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "jobs cannot be kept or run")
        assert "secret" not in ready.text + answer.text
        server.store.broken = False
        assert httpx.get(f"{server.url}/ready").status_code == 200


def test_requests_over_the_rate_of_a_key_are_refused_with_a_time(tmp_path):
    with serving(tmp_path, rate_limit="2/hour") as server:
        answers = [httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "x"}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert 3000 < int(answers[-1].headers["retry-after"]) <= 3600
        assert httpx.get(f"{server.url}/v1/jobs").status_code == 200


def test_metrics_and_the_log_say_what_was_done_and_no_prompt(tmp_path, caplog):
    with caplog.at_level("INFO", "pipeboost.serving"), serving(tmp_path) as server:
        httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a secret wish"})
        httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "fail"})
        httpx.get(f"{server.url}/v1/jobs/img_1")
        text = httpx.get(f"{server.url}/metrics").text
    for line in (
        'pipeboost_jobs_total{code="completed",kind="image"} 1.0',
        'pipeboost_jobs_total{code="out_of_memory",kind="image"} 1.0',
        'pipeboost_requests_total{route="/v1/images/generations",status="500"} 1.0',
        'pipeboost_requests_total{route="/v1/jobs/{job_id}",status="404"} 1.0',
        'pipeboost_stage_seconds_total{stage="denoise"} 0.2',
        "pipeboost_denoising_steps_total 4.0",
        "pipeboost_queue_depth 0.0",
        "pipeboost_worker_restarts 0.0",
        'pipeboost_worker_memory_bytes{kind="allocated"} 1024.0',
        'pipeboost_job_running_seconds_count{kind="image"} 1.0',
    ):
        assert line in text
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    first = lines[0]
    assert (first["route"], first["status"], first["method"]) == ("/v1/images/generations", 200, "POST")
    assert first["job"] in server.store.jobs
    assert lines[1]["code"] == "out_of_memory"
    assert "secret" not in str(lines) + caplog.text


def test_prompts_are_logged_only_where_that_is_asked_for(tmp_path, caplog):
    with caplog.at_level("INFO", "pipeboost.serving"), serving(tmp_path, log_prompts=True) as server:
        httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a secret wish"})
    assert [record.fields["prompt"] for record in caplog.records if hasattr(record, "fields")] == ["a secret wish"]


def test_results_are_copied_where_that_is_asked_for_and_their_url_is_told(tmp_path):
    async def work(service):
        copied = []

        def put(prefix, files):
            copied.extend(path.read_bytes() for path in files)
            return [f"{prefix}/{path.name}" for path in files]

        object.__setattr__(service.parts, "upload", put)
        job = await service.wait((await submitted(service)).id)
        kept = service.paths.of(job.id) / job.result.files[0]
        assert (job.upload, copied) == (f"s3://bucket/x/{job.id}/{kept.name}", [kept.read_bytes()])

        def fails(prefix, files):
            raise OSError(f"{files} no such bucket")

        object.__setattr__(service.parts, "upload", fails)
        job = await service.wait((await submitted(service)).id)
        assert (job.state, job.error.code) == ("failed", "generation_failed")
        assert str(tmp_path) not in job.error.message

    run(work, tmp_path, upload="s3://bucket/x/")


def test_what_has_ended_expires_and_what_is_not_kept_is_cleaned_away(tmp_path):
    async def work(service):
        job = await service.wait((await submitted(service)).id)
        assert job.expires == pytest.approx(time.time() + 100, abs=5)
        assert cleaned

    cleaned = []

    async def inside():
        service = service_of(tmp_path, retention=100)
        object.__setattr__(service.parts, "clean", lambda: cleaned.append(1))
        await service.start()
        await work(service)
        await service.drain(1)

    asyncio.run(asyncio.wait_for(inside(), 20))


def test_a_worker_that_refuses_its_model_ends_the_server_with_what_it_says(tmp_path):
    from pipeboost.core.errors import ConfigurationError
    from pipeboost.serving.server import bound, serve

    service = service_of(tmp_path)

    async def refuse():
        raise ConfigurationError("model_path='x' cannot be loaded")

    service.parts.worker.serve = refuse
    settings = service.settings.model_copy(update={"port": 0, "drain_timeout": 0.1})
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        asyncio.run(asyncio.wait_for(serve(service, settings, bound(settings)), 20))
