"""`launch`: start the ranks on this machine, run a function on each, and return what the first one returned."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException, start_processes

from pipeboost.core.errors import ConfigurationError, RankFailedError
from pipeboost.distributed.start import world_size

T = TypeVar("T")

_GRACE = 5.0
"""Seconds that ranks have to end by themselves once one has failed."""


def launch(fn: Callable[..., T], /, *args: Any, num_gpus: int, **kwargs: Any) -> T:
    """Run `fn(*args, **kwargs)` on `num_gpus` ranks of this machine and return what rank 0's returned.

    Each rank is a process with a GPU of its own, in which `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and
    `MASTER_PORT` are set as torchrun sets them; where there is no CUDA at all, ranks run on the CPU. With one rank `fn`
    runs in a process too. When this returns or raises, none of the processes is left, however it ends.

    Args:
        fn: a function that other processes can import; it accelerates its pipeline and calls it.
        args, kwargs: passed on; they and what rank 0 returns must be picklable.
        num_gpus: how many ranks.

    Raises:
        ConfigurationError: the machine has fewer GPUs, this process is a rank already, or `fn` cannot be sent.
        RankFailedError: a rank failed; the message has the first one's traceback, or its signal.
    """
    _require_possible(num_gpus)
    try:
        task = pickle.dumps((fn, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"launch cannot send {getattr(fn, '__qualname__', fn)!r} to other processes ({error}); it must be a "
            "function at the top of a module, and its arguments must be picklable"
        ) from error
    # The ranks meet here, so that none of them takes the meeting point with it when it dies.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, timeout=timedelta(minutes=5))
    with tempfile.TemporaryDirectory(prefix="pipeboost-") as folder:
        with _none_left() as processes:
            settings = (num_gpus, store.port, folder, task)
            ranks = start_processes(_run_rank, settings, num_gpus, join=False, start_method="spawn")
            processes += ranks.processes
            try:
                while not ranks.join(grace_period=_GRACE):
                    pass
            except ProcessException as error:
                raise _first_failure(error, folder) from None
        return pickle.loads(Path(folder, "result").read_bytes())


def _require_possible(num_gpus: int) -> None:
    if not isinstance(num_gpus, int) or isinstance(num_gpus, bool) or num_gpus < 1:
        raise ConfigurationError(f"num_gpus={num_gpus!r} must be an integer of at least 1")
    if world_size() > 1:
        raise ConfigurationError(
            f"launch(num_gpus={num_gpus}) was called on one of {world_size()} ranks; it starts the ranks itself: call "
            "the function directly, or start one process"
        )
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise ConfigurationError(
            f"num_gpus={num_gpus} is more than this machine has; use at most {torch.cuda.device_count()}"
        )


def _run_rank(rank: int, count: int, port: int, folder: str, task: bytes) -> None:
    # Should the process that launched be killed, nothing else would end this one.
    end_with_parent: Any = getattr(torch.multiprocessing, "_prctl_pr_set_pdeathsig")  # noqa: B009 - has no stub
    end_with_parent(signal.SIGKILL)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store runs already
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    try:
        fn, args, kwargs = pickle.loads(task)
        result = fn(*args, **kwargs)
        if rank == 0:
            Path(folder, "result").write_bytes(pickle.dumps(result))
    except Exception as error:
        failure = (time.monotonic(), rank, error if isinstance(error, RankFailedError) else None)
        Path(folder, f"failure-{rank}").write_bytes(pickle.dumps((*failure, traceback.format_exc())))
        raise


@contextlib.contextmanager
def _none_left() -> Iterator[list[Any]]:
    """None of the processes that are put into the list lives when this is left.

    Nor does one where Ctrl-C comes before they are put there: then it is all that were started inside.
    """
    before = set(torch.multiprocessing.active_children())
    started: list[Any] = []
    try:
        yield started
    finally:
        ranks = started or [process for process in torch.multiprocessing.active_children() if process not in before]
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()


def _first_failure(error: Any, folder: str) -> RankFailedError:
    """Of all ranks that failed: those of one machine have one clock."""
    told = sorted(
        (pickle.loads(path.read_bytes()) for path in Path(folder).glob("failure-*")), key=lambda failure: failure[0]
    )
    if told:
        _, rank, passed_on, text = told[0]
        if passed_on is not None:  # it knows which other rank was the first
            return passed_on
        return RankFailedError(f"rank {rank} failed", rank=rank, traceback=text)
    name = getattr(error, "signal_name", None)
    how = f"was killed by {name}" if name else f"has exited with code {error.exit_code}"
    return RankFailedError(f"rank {error.error_index} {how}", rank=error.error_index, signal=name)
