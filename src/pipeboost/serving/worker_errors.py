"""What an exception in the worker means for the job: a code, and a sentence without paths, prompts and tracebacks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeboost.core.errors import (
    Cancelled,
    ConfigurationError,
    MissingPackageError,
    PipeboostError,
    RankFailedError,
    UnsupportedError,
)
from pipeboost.serving.jobs import CANCELLED, FAILED, OUT_OF_MEMORY, REFUSED, WORKER_LOST

_OF_HOST_MEMORY = "DefaultCPUAllocator"
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", _OF_HOST_MEMORY)
_NO_ROOM = "the result could not be written to the server's disk"


def outcome_of(error: BaseException) -> tuple[str, str]:
    """Return the code and the sentence of a job that raised this; `WORKER_LOST` where the process cannot go on."""
    if isinstance(error, Cancelled):
        return CANCELLED, "the job was cancelled"
    if is_out_of_memory(error):
        text = str(error) if isinstance(error, PipeboostError) and not isinstance(error, RankFailedError) else ""
        return OUT_OF_MEMORY, text or "the worker ran out of memory; make the request smaller"
    if is_fatal(error):
        return WORKER_LOST, "the worker cannot go on after an error of its device or of one of its ranks"
    if isinstance(error, (ConfigurationError, UnsupportedError, MissingPackageError)):
        return REFUSED, str(error)
    if isinstance(error, PipeboostError):
        return FAILED, str(error)
    if isinstance(error, OSError):
        return FAILED, f"{_NO_ROOM}: {error.strerror or type(error).__name__}"
    return FAILED, f"the pipeline failed with {type(error).__name__}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it came of too little memory of the device or the host, on this rank or another."""
    for each in _chain(error):
        if isinstance(each, (torch.OutOfMemoryError, MemoryError)) or _OF_HOST_MEMORY in str(each):
            return True
        if isinstance(each, RankFailedError) and any(word in each.traceback for word in _OUT_OF_MEMORY):
            return True
    return False


def is_fatal(error: BaseException) -> bool:
    """Whether the process cannot run another job after it: its CUDA context is lost, or its ranks are out of step."""
    for each in _chain(error):
        out_of_step = isinstance(each, PipeboostError) and "out of step" in str(each)
        of_device = isinstance(each, torch.AcceleratorError) or (
            isinstance(each, RuntimeError) and str(each).startswith(("CUDA error", "cuDNN error", "NCCL error"))
        )
        of_memory = isinstance(each, torch.OutOfMemoryError)
        if isinstance(each, RankFailedError) or out_of_step or (of_device and not of_memory):
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
