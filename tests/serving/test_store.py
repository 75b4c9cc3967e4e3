"""Jobs are in the database as they were made, changed and ended."""

import json
import re
import sqlite3
import stat
import threading
import time
from dataclasses import replace

import pytest

from pipeboost.serving.errors import IdempotencyError, JobStateError, StorageError
from pipeboost.serving.jobs import WORKER_LOST, Call, Error, Lora, Paths
from pipeboost.serving.store import JobStore, new_id
from tests.serving.jobs import RESULT, make_job


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path / "data")


@pytest.fixture
def store(paths):
    store = JobStore(paths)
    yield store
    store.close()


def test_a_job_with_everything_is_read_as_it_was_written_by_the_next_server_too(paths):
    call = Call(
        "ein Käfer\n\0\ud800", 2**63, 3, "grau", 512, 768, 81, 30, 3.5, ("0.png", "1.png"), "mask.png",
        {"true_cfg_scale": 4.0}, (Lora("ink", 0.5), Lora("wool")), "low", 2,
    )  # fmt: skip
    job = make_job(call=call, wire={"size": None, "n": 3}, deadline=time.time() + 60, kind="video", upload="s3://b/x")
    store = JobStore(paths)
    store.create(job, files={"0.png": b"a", "1.png": b"b", "mask.png": b"c"})
    assert store.get(job.id) == job
    store.start(job.id)
    completed = store.complete(job.id, RESULT, 1e12)
    store.close()
    store = JobStore(paths)
    assert store.get(job.id) == completed
    assert completed == replace(
        job, state="completed", attempt=1, started=completed.started, ended=completed.ended, expires=1e12, result=RESULT
    )
    assert sorted(path.name for path in paths.of(job.id).iterdir()) == ["0.png", "1.png", "mask.png"]
    store.close()


def test_ids_cannot_be_guessed_and_say_the_kind():
    assert re.fullmatch(r"img_[0-9a-f]{32}", new_id("image"))
    assert re.fullmatch(r"video_[0-9a-f]{32}", new_id("video"))
    assert len({new_id("image") for _ in range(1000)}) == 1000


def test_nobody_else_on_the_machine_can_read_what_is_kept(paths, store):
    job = store.create(make_job(), files={"0.png": b"x"})
    for folder in (paths.data, paths.folders, paths.of(job.id)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in paths.data.glob("jobs.sqlite*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_change_waits_for_the_disk_so_that_a_loss_of_power_loses_none(store):
    assert store._database.rows("PRAGMA journal_mode") == [("wal",)]
    assert store._database.rows("PRAGMA synchronous") == [(2,)]


def test_a_job_is_its_owners_alone(store):
    job = store.create(make_job("anna"))
    assert store.get(job.id, "anna") == job
    assert store.get(job.id, "bert") is None
    assert store.get("img_0") is None
    assert store.get("img_\ud800", "\ud800") is None
    assert store.listed("bert") == ([], False)


def test_the_same_key_and_request_give_the_job_of_then_and_leave_no_second_folder(paths, store):
    job = store.create(make_job(), idempotency="k", digest="d")
    again = store.create(make_job(), files={"0.png": b"x"}, idempotency="k", digest="d")
    assert again == job
    with pytest.raises(IdempotencyError, match="idempotency key 'k' was used for another request"):
        store.create(make_job(), files={"0.png": b"x"}, idempotency="k", digest="other")
    assert [path.name for path in paths.folders.iterdir()] == [job.id]
    assert store.create(make_job("bert"), idempotency="k", digest="other").owner == "bert"
    store.delete(job.id)
    assert store.create(make_job(), idempotency="k", digest="other").id != job.id


def test_equal_requests_without_a_key_are_two_jobs_and_the_newest_can_be_found(store):
    first, second = (store.create(make_job(), digest="d") for _ in range(2))
    assert first.id != second.id
    assert store.find("anna", "d", since=0) == second
    assert store.find("anna", "d", since=time.time() + 1) is None
    assert store.find("bert", "d", since=0) is None
    store.create(make_job())
    assert store.find("anna", "", since=0) is None


def test_pages_of_a_list_hold_every_job_once_though_those_shown_are_deleted(store):
    jobs = [store.create(make_job(kind=kind)) for kind in ("image", "video") * 5]
    for order, expected in (("asc", jobs), ("desc", jobs[::-1])):
        seen, after, more = [], "", True
        while more:
            page, more = store.listed("anna", after=after, limit=4, order=order)
            seen, after = seen + page, page[-1].id
        assert seen == expected
    videos, more = store.listed("anna", kind="video", limit=5)
    assert (videos, more) == (jobs[::-2], False)
    shown, after = [], ""
    while page := store.listed("anna", after=after, limit=3)[0]:
        shown, after = shown + page, page[-1].id
        for job in page:
            store.delete(job.id)
    assert shown == jobs[::-1]
    other = store.create(make_job("bert"))
    for name in (other.id, "img_0"):
        with pytest.raises(JobStateError, match="is no job of yours"):
            store.listed("anna", after=name)


def test_the_steps_of_a_running_job_are_seen_at_once_and_written_at_most_once_a_second(paths, store):
    job = store.create(make_job())
    store.start(job.id)
    reader = sqlite3.connect(paths.database)
    written = set()
    for step in range(1, 201):
        store.step(job.id, step, 200)
        assert store.get(job.id).step == step
        written.add(json.loads(reader.execute("SELECT job FROM jobs").fetchone()[0])["step"])
    reader.close()
    assert store.get(job.id).progress == 99
    assert 1 in written
    assert len(written) <= 8  # the loop takes a moment where the machine is busy
    assert store.complete(job.id, RESULT, 1e12).progress == 100
    store.step(job.id, 3, 200)
    assert store.get(job.id).step == 200
    store.step("img_0", 1, 2)
    assert not store._steps


def test_a_job_that_has_ended_stays_as_it_is(paths, store):
    job = store.create(make_job())
    with pytest.raises(JobStateError, match="is queued and cannot be completed"):
        store.complete(job.id, RESULT, 1e12)
    with pytest.raises(JobStateError, match="is queued and cannot wait again"):
        store.requeue(job.id)
    store.start(job.id)
    with pytest.raises(JobStateError, match="is in_progress and cannot be started"):
        store.start(job.id)
    with pytest.raises(JobStateError, match="cancel it first"):
        store.delete(job.id)
    cancelled = store.cancel(job.id, 1e12)
    assert store.complete(job.id, RESULT, 2e12) == cancelled
    assert store.fail(job.id, Error("a", "b"), 2e12) == cancelled
    assert store.get(job.id) == cancelled
    with pytest.raises(JobStateError, match="there is no job 'img_0'"):
        store.start("img_0")


def test_what_a_job_without_a_result_had_made_is_deleted_and_its_pictures_stay(paths, store):
    for end in (
        lambda job: store.fail(job.id, Error("out_of_memory", "The GPU is full."), 1e12),
        lambda job: store.cancel(job.id, 1e12),
        lambda job: store.requeue(job.id),
    ):
        job = store.create(make_job(call=Call("a", 1, images=("in.png",), mask="m.png")), files={"in.png": b"x"})
        store.start(job.id)
        (paths.of(job.id) / "m.png").write_bytes(b"x")
        (paths.of(job.id) / "0.npy.part").write_bytes(b"x")
        (paths.of(job.id) / "arrays").mkdir()
        ended = end(job)
        assert sorted(path.name for path in paths.of(job.id).iterdir()) == ["in.png", "m.png"]
        assert ended == store.get(job.id)


def test_a_deleted_job_leaves_nothing(paths, store):
    job = store.create(make_job(call=Call("secret words", 1)), files={"0.png": b"x"})
    store.delete(job.id)
    store.delete(job.id)
    assert store.get(job.id) is None
    assert store.queued() == store.listed("anna")[0] == store.ended() == []
    assert not list(paths.folders.iterdir())
    with pytest.raises(JobStateError, match="there is no job"):
        store.start(job.id)


def test_after_a_crash_what_ran_waits_again_at_its_place_and_fails_the_second_time(paths):
    store = JobStore(paths)
    first, second, done = (store.create(make_job(), files={"in.png": b"x"}) for _ in range(3))
    store.start(done.id)
    store.complete(done.id, RESULT, 1e12)
    (paths.of(done.id) / "0.png").write_bytes(b"whole")
    for attempt in (1, 2):
        assert store.start(first.id).attempt == attempt
        (paths.of(first.id) / "half.png").write_bytes(b"x")
        store.close()  # a server that is killed says nothing either
        store = JobStore(paths)
        (changed,) = store.recover(expires=1e12)
        assert not (paths.of(first.id) / "half.png").exists()
        assert store.get(first.id) == changed
        if attempt == 1:
            assert (changed.state, changed.attempt, changed.started) == ("queued", 1, None)
            assert [job.id for job in store.queued()] == [first.id, second.id]
    assert changed.state == "failed"
    assert changed.error.code == WORKER_LOST
    assert changed.expires == 1e12
    assert store.recover() == []
    assert (paths.of(done.id) / "0.png").read_bytes() == b"whole"
    store.close()


def test_an_attempt_that_the_servers_own_end_cut_off_does_not_count(store):
    job = store.create(make_job())
    for _ in range(3):
        assert store.start(job.id).attempt == 1
        assert store.requeue(job.id, counted=False).attempt == 0


def test_one_of_many_threads_with_the_same_key_makes_the_job(paths, store):
    start, made = threading.Barrier(8), []

    def make() -> None:
        start.wait()
        made.append(store.create(make_job(), files={"0.png": b"x"}, idempotency="k", digest="d").id)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1
    assert [path.name for path in paths.folders.iterdir()] == [made[0]]


def test_two_threads_that_work_on_jobs_of_their_own_get_what_each_wrote(store):
    failures = []

    def work(owner: str) -> None:
        try:
            for step in range(1, 11):
                job = store.create(make_job(owner))
                store.start(job.id)
                store.step(job.id, step, 10)
                assert store.get(job.id, owner).step == step
                assert store.complete(job.id, RESULT, 1e12).state == "completed"
                assert store.listed(owner, limit=1)[0][0].id == job.id
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(owner,)) for owner in ("anna", "bert")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [len(store.listed(owner, limit=99)[0]) for owner in ("anna", "bert")] == [10, 10]


def test_a_closed_store_says_so(paths):
    store = JobStore(paths)
    store.close()
    store.close()
    with pytest.raises(StorageError, match="is closed"):
        store.queued()
