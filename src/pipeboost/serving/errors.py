"""What the rooms of the server raise to each other."""

from __future__ import annotations

from pipeboost.core.errors import PipeboostError


class StorageError(PipeboostError):
    """Nothing can be stored: the disk is full, or the database is locked or damaged; what was stored is not lost."""


class IdempotencyError(PipeboostError):
    """A request has the idempotency key of an earlier one that asked for something else."""


class JobStateError(PipeboostError):
    """There is no such job any more, or it is not in the state that a change of it needs."""


class JobError(PipeboostError):
    """A job cannot be done, for a reason that running it again does not change.

    Attributes:
        code: one of those in `jobs`.
        message: one sentence.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class JobCancelled(PipeboostError):  # noqa: N818 - as `Cancelled`
    """The running job was cancelled, and the worker is ready for the next one."""


class WorkerLost(PipeboostError):  # noqa: N818 - it is no fault of the job
    """The worker died, or was killed because it hung, while it ran the job."""


class Busy(PipeboostError):  # noqa: N818 - it is no fault of the request
    """Too many requests wait already.

    Attributes:
        retry_after: seconds.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(PipeboostError):  # noqa: N818 - it is no fault of the request
    """The server cannot take or finish jobs now: it stops, its model is not loaded yet, or its disk is full."""
