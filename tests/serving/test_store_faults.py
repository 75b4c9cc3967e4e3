"""What the store keeps where its server is killed, its disk is full, or its database is damaged or another's."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from pipeboost.core.errors import ConfigurationError
from pipeboost.serving import database
from pipeboost.serving.errors import StorageError
from pipeboost.serving.jobs import Paths
from pipeboost.serving.store import JobStore
from tests.serving.jobs import RESULT, files_at_most, make_job

KILLS = 14
WRITER = """
import sys
from pathlib import Path
from pipeboost.serving.jobs import Call, Error, Paths
from pipeboost.serving.store import JobStore
from tests.serving.jobs import RESULT, make_job

CALL = Call("a cat", 7, images=("in.png",))

def say(job_id, state):
    sys.stdout.write(f"{job_id} {state}\\n")
    sys.stdout.flush()

paths = Paths(Path(sys.argv[1]))
print("begins", flush=True)
store = JobStore(paths)
for job in store.recover():
    say(job.id, job.state)
for number in range(10**9):
    job = store.create(make_job(call=CALL), files={"in.png": bytes(5000)}, idempotency=f"{sys.argv[2]}-{number}")
    say(job.id, "queued")
    say(job.id, store.start(job.id).state)
    (paths.of(job.id) / "0.png").write_bytes(bytes(5000))
    if number % 3 == 1:
        say(job.id, store.fail(job.id, Error("a", "b"), 1e12).state)
    else:
        say(job.id, store.complete(job.id, RESULT, 1e12).state)
    if number % 3 == 2:
        store.delete(job.id)
        say(job.id, "deleted")
"""
AHEAD = {
    "queued": {"queued", "in_progress", "completed", "failed", "deleted"},
    "in_progress": {"in_progress", "completed", "failed", "deleted"},
    "completed": {"completed", "deleted"},
    "failed": {"failed", "deleted"},
    "deleted": {"deleted"},
}
"""What a job can be in when its writer is killed after it has said the key."""


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path / "data")


def _writer(paths, name=""):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(paths.data), name], stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_whenever_its_server_is_killed_every_job_is_as_it_was_last_said_to_be(paths):
    said, chance = {}, random.Random(7)
    for kill in range(KILLS):
        writer = _writer(paths, str(kill))
        assert writer.stdout.readline() == "begins\n"
        # From within the opening of the database to the middle of any change.
        lines = [writer.stdout.readline() for _ in range(chance.choice((0, 2, 4, 7, 10)))]
        time.sleep(chance.uniform(0, 0.03))
        writer.send_signal(signal.SIGKILL)
        for line in [*lines, *writer.stdout.read().splitlines()]:
            job_id, state = line.split()
            said[job_id] = state
        writer.wait()
        store = JobStore(paths)
        assert store.check() is None
        for job_id, state in said.items():
            job = store.get(job_id)
            found = job.state if job else "deleted"
            assert found in AHEAD[state], (job_id, state)
            said[job_id] = found
            if found == "completed":
                assert (paths.of(job_id) / "0.png").stat().st_size == 5000
            if found != "deleted":
                assert (paths.of(job_id) / "in.png").stat().st_size == 5000
        for job in store.recover():
            said[job.id] = job.state
        assert not store._of_state("in_progress")
        store.close()
    assert len(said) > KILLS
    assert {"completed", "failed"} <= set(said.values())


def test_a_second_server_is_refused_while_the_first_one_lives(paths):
    writer = _writer(paths)
    while not writer.stdout.readline().startswith("img_"):
        pass
    with pytest.raises(ConfigurationError, match=rf"another server \(process {writer.pid}\) has the data folder"):
        JobStore(paths)
    writer.kill()
    writer.communicate()
    first = JobStore(paths)
    with pytest.raises(ConfigurationError, match="another server"):
        JobStore(paths)
    assert first.check() is None
    first.close()
    JobStore(paths).close()


def _completed(store):
    job = store.create(make_job(), files={"in.png": bytes(1000)})
    store.start(job.id)
    return store.complete(job.id, RESULT, 1e12)


def _fill(store, jobs):
    while True:
        jobs.append(store.create(make_job(), files={"in.png": bytes(4000)}))


def _fill_disk(path):
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_no_job_and_is_well_again_once_there_is_room(tiny_disk):
    paths = Paths(tiny_disk / "data")
    store = JobStore(paths)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    jobs = [_completed(store)]
    running = store.create(make_job())
    store.start(running.id)
    with pytest.raises(StorageError, match=r"cannot be (written|made).*(full|space)"):
        _fill(store, jobs)
    with pytest.raises(OSError, match="space"):
        _fill_disk(tiny_disk / "more")
    assert "cannot be written" in store.check()
    with pytest.raises(StorageError):
        store.create(make_job(), files={"in.png": bytes(4000)})
    assert [store.get(job.id) for job in jobs] == jobs
    store.step(running.id, 3, 10)
    assert store.get(running.id).step == 3
    deleted = jobs.pop()
    store.delete(deleted.id)
    assert store.get(deleted.id) is None
    assert not paths.of(deleted.id).exists()
    with pytest.raises(OSError, match="space"):
        _fill_disk(tiny_disk / "still more")
    store.close()
    with pytest.raises(ConfigurationError, match=r"cannot be (opened|written).*(full|space)"):
        JobStore(paths)
    for file in (ballast, tiny_disk / "more", tiny_disk / "still more"):
        file.unlink()
    store = JobStore(paths)
    assert [store.get(job.id) for job in jobs] == jobs
    assert sorted(path.name for path in paths.folders.iterdir()) == sorted(job.id for job in [*jobs, running])
    for job in jobs[1:]:
        store.delete(job.id)
    assert store.check() is None
    assert _completed(store).state == "completed"
    store.close()


def test_a_database_that_may_not_grow_keeps_what_it_has(paths):
    store = JobStore(paths)
    jobs, failed = [_completed(store)], None
    with files_at_most(200_000):
        for _ in range(200):
            try:
                jobs.append(store.create(make_job()))
            except StorageError as error:
                failed = error
                break
        assert "cannot be written" in str(failed)
        assert "\n" not in str(failed)
        assert store.check() is not None
        assert store.queued() == jobs[1:]
        assert len(list(paths.folders.iterdir())) == len(jobs)
    assert store.check() is None
    jobs.append(store.create(make_job()))
    assert store.queued() == jobs[1:]
    store.close()


def test_a_locked_database_is_one_sentence_and_changes_nothing(paths, monkeypatch):
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 50)
    store = JobStore(paths)
    job = store.create(make_job())
    other = sqlite3.connect(paths.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match=r"jobs\.sqlite cannot be written: database is locked"):
        store.start(job.id)
    assert "database is locked" in store.check()
    assert store.get(job.id) == job
    other.execute("COMMIT")
    other.close()
    assert store.start(job.id).attempt == 1
    assert store.check() is None
    store.close()


def _database_of_many_jobs(paths):
    store = JobStore(paths)
    for _ in range(30):
        store.create(make_job())
    store.close()
    return paths.database.read_bytes()


def test_a_truncated_database_is_refused_and_left_alone(paths):
    whole = _database_of_many_jobs(paths)
    for length in (0, 50, 4096, len(whole) // 2, len(whole) - 100):
        paths.database.write_bytes(whole[:length])
        with pytest.raises(ConfigurationError) as caught:
            JobStore(paths)
        assert "\n" not in str(caught.value)
        assert str(paths.database) in str(caught.value)
        assert paths.database.read_bytes() == whole[:length]
        for extra in paths.data.glob("jobs.sqlite-*"):
            extra.unlink()
    paths.database.unlink()
    with pytest.raises(ConfigurationError, match=r"is missing or empty, but .* holds files of jobs"):
        JobStore(paths)
    paths.database.write_bytes(whole)
    store = JobStore(paths)
    assert len(store.queued()) == 30
    store.close()


def test_a_damaged_database_is_refused_and_a_damaged_job_is_one_sentence(paths):
    whole = _database_of_many_jobs(paths)
    page = len(whole) // 2 // 4096 * 4096
    paths.database.write_bytes(whole[:page] + random.Random(3).randbytes(4096) + whole[page + 4096 :])
    with pytest.raises(ConfigurationError, match=r"is corrupt|malformed"):
        JobStore(paths)
    paths.database.write_bytes(whole)
    other = sqlite3.connect(paths.database)
    other.execute("UPDATE jobs SET job = '{\"id\": 1}' WHERE seq = 1")
    other.commit()
    other.close()
    store = JobStore(paths)
    with pytest.raises(StorageError, match="a job in the database cannot be read"):
        store.queued()
    store.close()


@pytest.mark.parametrize(
    ("statement", "message"),
    [("PRAGMA user_version = 2", "newer pipeboost"), ("PRAGMA user_version = 0", "another program's database")],
)
def test_a_database_of_another_make_is_refused(paths, statement, message):
    JobStore(paths).close()
    other = sqlite3.connect(paths.database)
    other.execute(statement)
    other.close()
    with pytest.raises(ConfigurationError, match=message):
        JobStore(paths)


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="cannot be used as the data folder"):
        JobStore(Paths(tmp_path / "file"))
    (tmp_path / "data" / "jobs.sqlite").mkdir(parents=True)
    with pytest.raises(ConfigurationError):
        JobStore(Paths(tmp_path / "data"))


def test_the_lock_is_not_handed_to_programs_that_the_server_starts(paths):
    store = JobStore(paths)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        store.close()
        JobStore(paths).close()
    finally:
        child.kill()
        child.wait()
    assert os.WIFSIGNALED(-child.returncode) or child.returncode == -signal.SIGKILL
