"""`JobStore`: every job in a database that outlives the server, whichever moment it is killed at."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipeboost.core.errors import quoted
from pipeboost.serving.database import Database
from pipeboost.serving.errors import IdempotencyError, JobStateError, StorageError
from pipeboost.serving.files import keep_only, remove_folder, storage_errors, sync_folder, write_whole
from pipeboost.serving.job_json import job_from_json, job_to_json
from pipeboost.serving.jobs import ENDED, WORKER_LOST, Error, Job, Kind, Paths, Result

TOMBSTONES_SECONDS = 86400.0
"""How long a deleted job can still be named as the last one that a page of a list has shown."""
_PREFIXES: dict[Kind, str] = {"image": "img_", "video": "video_"}


def new_id(kind: Kind) -> str:
    """Return an id that cannot be guessed: the kind and 128 random bits."""
    return _PREFIXES[kind] + secrets.token_hex(16)


class JobStore:
    """The jobs of one data folder, which no other server can have meanwhile. Any thread may call any method.

    What a method has returned from is on the disk. A job that has ended stays as it is: whichever of `complete`, `fail`
    and `cancel` comes later returns it unchanged.

    Raises:
        ConfigurationError: another server has the folder, it cannot be written to or has no room, or its database is
            corrupt or of a newer version.
        StorageError: raised by the methods, where nothing can be stored.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._lock = threading.RLock()
        self._steps: dict[str, tuple[int, int]] = {}
        self._stepped = 0.0
        self._database = Database(paths)

    def create(
        self, job: Job, *, files: Mapping[str, bytes] | None = None, idempotency: str = "", digest: str = ""
    ) -> Job:
        """Store a new job, and files in its folder before, and return it.

        Args:
            files: the request's pictures by the names that its call has.
            idempotency: the client's key for this request. The same owner, key and digest give the job of then.
            digest: of the request; `find` looks for it.

        Raises:
            IdempotencyError: the owner's key stands for a request of another digest.
        """
        earlier = self._earlier(job.owner, idempotency, digest)
        if earlier is not None:
            return earlier
        folder = self._paths.of(job.id)
        try:
            self._write_files(folder, files or {})
            with self._changing() as execute:
                earlier = self._earlier(job.owner, idempotency, digest)
                if earlier is None:
                    execute(
                        "INSERT INTO jobs (id, owner, kind, state, idempotency, digest, job) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (job.id, job.owner, job.kind, job.state, idempotency, digest, job_to_json(job)),
                    )
                    return job
        except BaseException:
            with contextlib.suppress(StorageError):
                remove_folder(folder)
            raise
        remove_folder(folder)
        return earlier

    def _write_files(self, folder: Path, files: Mapping[str, bytes]) -> None:
        with storage_errors(folder, "cannot be made"):
            folder.mkdir(mode=0o700, exist_ok=True)
            if files:
                sync_folder(folder.parent)
        for name, content in files.items():
            assert name == Path(name).name, name
            write_whole(folder / name, content)

    def _earlier(self, owner: str, idempotency: str, digest: str) -> Job | None:
        if not idempotency:
            return None
        rows = self._rows("SELECT job, digest FROM jobs WHERE owner = ? AND idempotency = ?", (owner, idempotency))
        if rows and rows[0][1] != digest:
            raise IdempotencyError(
                f"the idempotency key {quoted(idempotency)} was used for another request; use a new one"
            )
        return self._read(rows[0][0]) if rows else None

    def find(self, owner: str, digest: str, *, since: float) -> Job | None:
        """Return the newest job that an owner made of a request with this digest, unless it is older than `since`."""
        rows = self._rows(
            "SELECT job FROM jobs WHERE owner = ? AND digest = ? ORDER BY seq DESC LIMIT 1", (owner, digest)
        )
        job = self._read(rows[0][0]) if rows and digest else None
        return job if job is not None and job.created >= since else None

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """Return a job as it is now; None where there is none, or where it is not the owner's that is given."""
        rows = self._rows("SELECT job FROM jobs WHERE id = ? AND job != ''", (job_id,))
        job = self._read(rows[0][0]) if rows else None
        return job if job is not None and owner in (None, job.owner) else None

    def listed(
        self,
        owner: str,
        *,
        kind: Kind | None = None,
        after: str = "",
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[Job], bool]:
        """Return an owner's jobs by when they were made, the newest first unless `order` is `"asc"`.

        Args:
            after: id of the job to begin behind, such as the last of the page before; it may be deleted meanwhile.

        Returns:
            At most `limit` jobs, and whether there are more.

        Raises:
            JobStateError: `after` is none of the owner's.
        """
        where, values = ["owner = ?", "job != ''"], [owner]
        with self._lock:
            if kind is not None:
                where.append("kind = ?")
                values.append(kind)
            if after:
                rows = self._rows("SELECT seq FROM jobs WHERE id = ? AND owner = ?", (after, owner))
                if not rows:
                    raise JobStateError(
                        f"after={quoted(after)} is no job of yours; leave it out or name one of the list"
                    )
                where.append(f"seq {'<' if order == 'desc' else '>'} ?")
                values.append(rows[0][0])
            rows = self._rows(
                f"SELECT job FROM jobs WHERE {' AND '.join(where)} "
                f"ORDER BY seq {'DESC' if order == 'desc' else 'ASC'} LIMIT ?",
                (*values, limit + 1),
            )
            return [self._read(row[0]) for row in rows[:limit]], len(rows) > limit

    def queued(self) -> list[Job]:
        """Return the jobs that wait, the earliest first."""
        return self._of_state("queued")

    def ended(self, *, expired: float | None = None, limit: int = 100) -> list[Job]:
        """Return at most `limit` jobs that have ended, the earliest end first.

        Args:
            expired: only those that expire before this time.
        """
        sql = (
            "SELECT job FROM jobs WHERE ended IS NOT NULL AND job != '' AND (? IS NULL OR expires < ?) "
            "ORDER BY ended LIMIT ?"
        )
        return [self._read(row[0]) for row in self._rows(sql, (expired, expired, limit))]

    def ids(self) -> set[str]:
        """Return the ids of all jobs."""
        return {row[0] for row in self._rows("SELECT id FROM jobs WHERE job != ''", ())}

    def start(self, job_id: str) -> Job:
        """Note that the worker is given a job that waits: one attempt more."""

        def started(job: Job) -> Job:
            if job.state != "queued":
                raise JobStateError(f"the job {job_id} is {job.state} and cannot be started")
            return dataclasses.replace(
                job, state="in_progress", attempt=job.attempt + 1, started=time.time(), step=0, steps=0
            )

        with self._lock:
            job = self._change(job_id, started)
            self._steps[job_id] = (0, 0)
            return job

    def step(self, job_id: str, step: int, steps: int) -> None:
        """Note where the running call of a job is: at once for `get`, and on the disk at most once a second."""
        with self._lock:
            if job_id not in self._steps:  # it does not run any more
                return
            self._steps[job_id] = (step, steps)
            if time.monotonic() - self._stepped < 1:
                return
            self._stepped = time.monotonic()
            with contextlib.suppress(StorageError, JobStateError):  # progress alone ends no job
                self._change(job_id, lambda job: job)

    def complete(self, job_id: str, result: Result, expires: float) -> Job:
        """End a running job with its result, whose files are in its folder and on the disk."""
        return self._end(job_id, "completed", expires, result=result)

    def fail(self, job_id: str, error: Error, expires: float) -> Job:
        """End a job with an error, and delete what it had made."""
        return self._end(job_id, "failed", expires, error=error)

    def cancel(self, job_id: str, expires: float) -> Job:
        """End a job that nobody wants any more, and delete what it had made."""
        return self._end(job_id, "cancelled", expires)

    def _end(self, job_id: str, state: Literal["completed", "failed", "cancelled"], expires: float, **what: Any) -> Job:
        def ended(job: Job) -> Job:
            if job.state in ENDED:
                return job
            if state == "completed" and job.state != "in_progress":
                raise JobStateError(f"the job {job_id} is {job.state} and cannot be completed")
            return dataclasses.replace(job, state=state, ended=time.time(), expires=expires, **what)

        with self._lock:
            job = self._change(job_id, ended)
            self._steps.pop(job_id, None)
        if job.state != "completed":
            self._delete_made(job)
        return job

    def requeue(self, job_id: str, *, counted: bool = True) -> Job:
        """Let a running job wait again, at its old place, and delete what it had made.

        Args:
            counted: whether the attempt counts, as it does where the worker died; not where the server is stopped.
        """

        def requeued(job: Job) -> Job:
            if job.state != "in_progress":
                raise JobStateError(f"the job {job_id} is {job.state} and cannot wait again")
            attempt = job.attempt if counted else job.attempt - 1
            return dataclasses.replace(job, state="queued", attempt=attempt, started=None, step=0, steps=0)

        with self._lock:
            job = self._change(job_id, requeued)
            self._steps.pop(job_id, None)
        self._delete_made(job)
        return job

    def upload(self, job_id: str, url: str) -> Job:
        """Note where the results were stored besides."""
        return self._change(job_id, lambda job: dataclasses.replace(job, upload=url))

    def delete(self, job_id: str) -> None:
        """Delete a job with its folder; one that is not there is deleted already.

        Raises:
            JobStateError: it is running; cancel it first.
        """
        with self._lock:
            job = self.get(job_id)
            if job is None:
                return
            if job.state == "in_progress":
                raise JobStateError(f"the job {job_id} is running; cancel it first")
            try:
                self._bury(job_id)
            except StorageError:
                self._database.make_room()
                self._bury(job_id)
        remove_folder(self._paths.of(job_id))

    def _bury(self, job_id: str) -> None:
        now = time.time()
        with self._changing() as execute:
            execute(
                "UPDATE jobs SET job = '', idempotency = '', digest = '', state = 'deleted', ended = ? WHERE id = ?",
                (now, job_id),
            )
            execute("DELETE FROM jobs WHERE state = 'deleted' AND ended < ?", (now - TOMBSTONES_SECONDS,))

    def recover(self, *, expires: float | None = None) -> list[Job]:
        """Settle the jobs that ran when the last server ended: they wait again, and from the second attempt on fail.

        Args:
            expires: of those that fail.

        Returns:
            Those that are changed, as they are now.
        """
        changed = []
        for job in self._of_state("in_progress"):
            if job.attempt < 2:
                changed.append(self.requeue(job.id))
            else:
                error = Error(WORKER_LOST, "the server or its worker was lost twice while it ran this")
                changed.append(self._end(job.id, "failed", expires or time.time() + TOMBSTONES_SECONDS, error=error))
        return changed

    def check(self) -> str | None:
        """Return why nothing can be stored now, in one sentence; None where it can."""
        try:
            with self._lock:
                self._database.check()
        except StorageError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Let another server have the folder."""
        with self._lock:
            self._database.close()

    def _of_state(self, state: str) -> list[Job]:
        return [self._read(row[0]) for row in self._rows("SELECT job FROM jobs WHERE state = ? ORDER BY seq", (state,))]

    def _change(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        with self._changing() as execute:
            found = self.get(job_id)
            if found is None:
                raise JobStateError(f"there is no job {quoted(job_id)}")
            job = change(found)
            execute(
                "UPDATE jobs SET state = ?, ended = ?, expires = ?, job = ? WHERE id = ?",
                (job.state, job.ended, job.expires, job_to_json(job), job_id),
            )
        return job

    def _delete_made(self, job: Job) -> None:
        """Delete what the worker made for a job that has no result; what stays goes with the job."""
        with contextlib.suppress(StorageError):
            keep_only(self._paths.of(job.id), {*job.call.images, job.call.mask or ""})

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        with self._lock, self._database.changing() as execute:
            yield execute

    def _rows(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            return self._database.rows(sql, values)

    def _read(self, text: str) -> Job:
        job = job_from_json(text)
        step = self._steps.get(job.id) if job.state == "in_progress" else None
        return dataclasses.replace(job, step=step[0], steps=step[1]) if step else job
