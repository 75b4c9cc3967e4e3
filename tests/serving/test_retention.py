"""Jobs go when they have expired or take too much room, with all that they left; those that have not ended stay."""

import os
import time

import pytest

from pipeboost.serving import retention
from pipeboost.serving.jobs import Error, Paths
from pipeboost.serving.retention import Retention
from pipeboost.serving.store import JobStore
from tests.serving.jobs import RESULT, make_job


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path / "data")


@pytest.fixture
def store(paths):
    store = JobStore(paths)
    yield store
    store.close()


def _ended(store, expires, size=10):
    job = store.create(make_job(), files={"in.png": bytes(size)})
    store.start(job.id)
    return store.complete(job.id, RESULT, expires)


def _kept(paths):
    return {path.name for path in paths.folders.iterdir()}


def test_expired_jobs_go_with_their_uploads_and_others_stay(paths, store):
    now = time.time()
    retention = Retention(store, paths, seconds=60)
    assert now + 60 <= retention.expires() < now + 70
    gone = [_ended(store, now - 1) for _ in range(3)]
    failed = store.create(make_job())
    store.fail(failed.id, Error("a", "b"), now - 1)
    kept, waiting = _ended(store, now + 60), store.create(make_job())
    swept = retention.sweep(now)
    assert set(swept.jobs) == {job.id for job in [*gone, failed]}
    assert _kept(paths) == {kept.id, waiting.id}
    assert [store.get(job.id) for job in gone] == [None] * 3
    assert store.get(kept.id) == kept
    assert set(retention.sweep(now + 61).jobs) == {kept.id}


def test_more_jobs_than_one_page_expire_in_one_sweep(paths, store):
    jobs = [store.create(make_job()) for _ in range(103)]
    for job in jobs:
        store.cancel(job.id, 1.0)
    assert len(Retention(store, paths, seconds=1).sweep(time.time()).jobs) == 103


def test_above_the_budget_the_earliest_ended_go_until_the_rest_fits(paths, store):
    jobs = [_ended(store, 1e12, size=100_000) for _ in range(6)]
    retention = Retention(store, paths, seconds=60, budget=400_000)
    swept = retention.sweep(time.time())
    assert list(swept.jobs) == [job.id for job in jobs[: len(swept.jobs)]]
    assert 2 <= len(swept.jobs) <= 3
    assert not swept.over
    assert 0 < swept.left <= 400_000
    assert _kept(paths) == {job.id for job in jobs[len(swept.jobs) :]}
    assert retention.sweep(time.time()).jobs == ()
    assert len(Retention(store, paths, seconds=60).sweep(time.time()).jobs) == 0


def test_jobs_that_have_not_ended_stay_whatever_room_they_take(paths, store):
    waiting, running = (store.create(make_job(), files={"in.png": bytes(100_000)}) for _ in range(2))
    store.start(running.id)
    ended = _ended(store, 1e12)
    swept = Retention(store, paths, seconds=60, budget=1000).sweep(time.time())
    assert swept.jobs == (ended.id,)
    assert swept.over
    assert _kept(paths) == {waiting.id, running.id}


def test_old_folders_without_a_job_go_and_new_ones_may_be_a_request_that_is_being_stored(paths, store):
    job = store.create(make_job())
    for name in (job.id, "img_old", "img_new"):
        (paths.folders / name).mkdir(exist_ok=True)
        (paths.folders / name / "in.png").write_bytes(b"x")
    now = time.time()
    for name in (job.id, "img_old"):
        os.utime(paths.folders / name, (0, now - retention.ORPHAN_SECONDS - 1))
    Retention(store, paths, seconds=60).sweep(now)
    assert _kept(paths) == {job.id, "img_new"}
