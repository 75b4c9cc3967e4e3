"""`launch`: start the ranks on this machine, run a function on each, and return what the first one returned."""

from __future__ import annotations

import math
import os
import pickle
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing

from pipeboost.core.errors import ConfigurationError, RankFailedError
from pipeboost.distributed.authentication import VARIABLE
from pipeboost.distributed.local_processes import death_by
from pipeboost.distributed.start import world_size

T = TypeVar("T")

_GRACE = 5.0
"""Seconds that ranks have to end by themselves once one has failed, or Ctrl-C was pressed."""
_PATIENCE = timedelta(minutes=5)


def launch(fn: Callable[..., T], /, *args: Any, num_gpus: int, **kwargs: Any) -> T:
    """Run `fn(*args, **kwargs)` on `num_gpus` ranks of this machine and return what rank 0's returned.

    Each rank is a process with a GPU of its own, in which `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and
    `MASTER_PORT` are set as torchrun sets them; where there is no CUDA at all, ranks run on the CPU. With one rank `fn`
    runs in a process too. When this returns or raises, none of the processes is left, however it ends. Ctrl-C reaches
    the ranks, which have a few seconds to keep what they have done.

    Args:
        fn: a function that other processes can import; it accelerates its pipeline and calls it.
        args, kwargs: passed on; they and what rank 0 returns must be picklable.
        num_gpus: how many ranks.

    Raises:
        ConfigurationError: the machine has fewer GPUs, or CPUs where it has no GPU, this process is a rank already, or
            `fn` cannot be sent.
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
    # The ranks meet here, so that none of them takes the store with it when it dies; other machines cannot reach it.
    listening = socket.create_server(("127.0.0.1", 0))
    port, descriptor = listening.getsockname()[1], listening.detach()
    store = dist.TCPStore("127.0.0.1", port, None, True, _PATIENCE, False, master_listen_fd=descriptor)
    context, secret = torch.multiprocessing.get_context("spawn"), secrets.token_hex()
    pipes = [context.Pipe(duplex=False) for _ in range(num_gpus)]
    processes = [
        context.Process(target=_run_rank, args=(rank, num_gpus, store.port, secret, theirs, task))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        return pickle.loads(_result([ours for ours, _ in pipes], processes))
    finally:  # none is left
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _require_possible(num_gpus: int) -> None:
    if not isinstance(num_gpus, int) or isinstance(num_gpus, bool) or num_gpus < 1:
        raise ConfigurationError(f"num_gpus={num_gpus!r} must be an integer of at least 1")
    if world_size() > 1:
        raise ConfigurationError(
            f"launch(num_gpus={num_gpus}) was called on one of {world_size()} ranks; it starts the ranks itself: call "
            "the function directly, or start one process"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    most = gpus or os.cpu_count() or 1
    if num_gpus > most:
        without = "" if gpus else ", which has no GPU but so many CPUs"
        raise ConfigurationError(f"num_gpus={num_gpus} is more than this machine has; use at most {most}{without}")


def _run_rank(rank: int, count: int, port: int, secret: str, launcher: Connection, task: bytes) -> None:
    # Should the process that launched be killed, nothing else would end this one.
    end_with_parent: Any = getattr(torch.multiprocessing, "_prctl_pr_set_pdeathsig")  # noqa: B009 - has no stub
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, _interrupt_once)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", VARIABLE: secret})
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")  # the store runs already
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    try:
        fn, args, kwargs = pickle.loads(task)
        result = fn(*args, **kwargs)
        if rank == 0:
            launcher.send(pickle.dumps(result))
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        passed_on = error if isinstance(error, RankFailedError) else None
        launcher.send(_Failed(time.monotonic(), rank, passed_on, traceback.format_exc()))
        raise SystemExit(1) from None


def _interrupt_once(*_: Any) -> None:
    # A terminal tells the ranks of Ctrl-C, and so does the process that launched: what they keep then is kept once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


class _Failed(NamedTuple):
    """What a rank sends of its exception; `passed_on` where it knows which other rank was the first."""

    time: float
    rank: int
    passed_on: RankFailedError | None
    traceback: str


def _result(connections: Sequence[Connection], processes: Sequence[Any]) -> Any:
    """What rank 0 returned, pickled, once all have ended well."""
    results: list[bytes] = []
    failures: list[_Failed] = []
    first: tuple[int, int] | None = None
    running, until = {connection: rank for rank, connection in enumerate(connections)}, math.inf
    try:
        while running and (left := until - time.monotonic()) > 0:
            for connection in wait(list(running), None if left == math.inf else left):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                    (failures if isinstance(message, _Failed) else results).append(message)
                except (EOFError, OSError):  # the latter in the middle of a message
                    rank = running.pop(connection)
                    processes[rank].join()
                    if processes[rank].exitcode != 0 and first is None:
                        first, until = (rank, processes[rank].exitcode), time.monotonic() + _GRACE
    except KeyboardInterrupt:
        _interrupt(processes)
        raise
    if failures:  # all ranks of one machine have one clock
        _, rank, passed_on, text = min(failures)
        raise passed_on or RankFailedError(f"rank {rank} failed", rank=rank, traceback=text)
    if first is not None or not results:
        rank, code = first or (0, 0)
        death = death_by(code)
        raise RankFailedError(f"rank {rank} {death.how}", rank=rank, signal=death.signal)
    return results[0]


def _interrupt(processes: Sequence[Any]) -> None:
    """Pass Ctrl-C on to the ranks, and give them time to keep what they have done."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    until = time.monotonic() + _GRACE
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
