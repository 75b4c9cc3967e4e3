"""`Retention`: how long jobs are kept, and how much room they may take."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from pipeboost.serving.files import bytes_of, remove_folder
from pipeboost.serving.jobs import Paths
from pipeboost.serving.store import JobStore

ORPHAN_SECONDS = 3600.0
"""Age from which a folder without a job is no request's that is just being stored."""


@dataclass(frozen=True)
class Swept:
    """What one sweep did.

    Attributes:
        jobs: ids of the jobs that were deleted.
        left: bytes that the folders of all jobs take now; 0 where no budget asks for them.
        over: whether that is more than the budget, since jobs that have not ended are never deleted.
    """

    jobs: tuple[str, ...]
    left: int
    over: bool


class Retention:
    """Deletes jobs that have expired, then those that ended first until the rest fits, and folders without a job.

    Args:
        seconds: how long a job is kept after it has ended.
        budget: bytes that the folders of jobs may take; None for all there are.
    """

    def __init__(self, store: JobStore, paths: Paths, *, seconds: float, budget: int | None = None) -> None:
        self._store = store
        self._paths = paths
        self._seconds = seconds
        self._budget = budget

    def expires(self) -> float:
        """Return when a job that ends now expires."""
        return time.time() + self._seconds

    def sweep(self, now: float) -> Swept:
        """Delete what is to go by now.

        Raises:
            StorageError: something cannot be deleted.
        """
        deleted: list[str] = []
        while jobs := self._store.ended(expired=now):
            for job in jobs:
                self._delete(job.id, deleted)
        self._delete_orphans(now)
        if self._budget is None:
            return Swept(tuple(deleted), 0, False)
        left = bytes_of(self._paths.folders)
        while left > self._budget and (jobs := self._store.ended(limit=10)):
            for job in jobs:
                if left > self._budget:
                    left -= bytes_of(self._paths.of(job.id))
                    self._delete(job.id, deleted)
        return Swept(tuple(deleted), left, left > self._budget)

    def _delete(self, job_id: str, deleted: list[str]) -> None:
        self._store.delete(job_id)
        deleted.append(job_id)

    def _delete_orphans(self, now: float) -> None:
        known = self._store.ids()
        for folder in filter(Path.is_dir, self._paths.folders.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                if folder.name not in known and folder.stat().st_mtime < now - ORPHAN_SECONDS:
                    remove_folder(folder)
