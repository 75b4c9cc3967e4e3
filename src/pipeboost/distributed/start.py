"""The world: the ranks that torchrun, our own launcher or the user's script has started, and where they meet."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pipeboost.core.errors import ConfigurationError, PipeboostError, quoted
from pipeboost.distributed.local_processes import Absence, patience

T = TypeVar("T")


class World(NamedTuple):
    """All ranks.

    Attributes:
        store: where they meet.
        rank: this process's.
        size: how many there are.
    """

    store: Any
    rank: int
    size: int


def world_size() -> int:
    """Return how many ranks there are: of torch.distributed where it runs, else those that torchrun has announced.

    Raises:
        ConfigurationError: what is announced is no number.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if "RANK" not in os.environ:
        return 1
    _announced("RANK", 0)
    return max(1, _announced("WORLD_SIZE", 1))


def _announced(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, str(otherwise))
    if not text.strip().isdecimal():
        raise ConfigurationError(f"the environment variable {variable}={quoted(text)} must be a number; unset it")
    return int(text)


def world() -> World:
    """Return all ranks. torch.distributed stays as it is: where it does not run, they meet at torchrun's address."""
    if dist.is_initialized():
        return World(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())
    if world_size() == 1:
        return World(dist.HashStore(), 0, 1)
    return _announced_world()


@functools.cache
def _announced_world() -> World:
    """Join the store as `env://` does, but for waiting without a look at whether the others live."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"this process is rank {rank} of {size}, but MASTER_ADDR and MASTER_PORT do not say where the ranks meet "
            f"({error}); start them with torchrun, or set both"
        ) from error
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not by_agent
    if not serves:
        _await_store(host, port)
    store: Any = answer_of_store(
        lambda: dist.TCPStore(host, port, None, serves, wait_for_workers=False, multi_tenant=True)
    )
    if by_agent:
        store = dist.PrefixStore(f"/worker/attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return World(store, rank, size)


def _await_store(host: str, port: int) -> None:
    absence, until = Absence(), time.monotonic() + patience()
    while True:
        try:
            socket.create_connection((host, port), 5.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise PipeboostError(f"rank 0 does not keep a store at {host}:{port} ({error})") from error
        absence.check([0])
        time.sleep(0.05)


def answer_of_store(ask: Callable[[], T]) -> T:
    """Return what the store answers; torch alone would wait for ever where the process that keeps it stands still.

    Raises:
        PipeboostError: it does not answer in time.
        Exception: what asking raises.
    """
    answer = Future[T]()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="pipeboost store", daemon=True).start()
    try:
        return answer.result(patience())
    except TimeoutError:
        raise PipeboostError(
            f"the process that keeps the ranks' store has not answered for {patience():.0f} s"
        ) from None


def local_device() -> torch.device:
    """Return the device of this rank: the CUDA device that `LOCAL_RANK` numbers, or the CPU.

    Raises:
        ConfigurationError: there are more ranks on this machine than devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = _announced("LOCAL_RANK", torch.cuda.current_device())
    if index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"rank {index} of this machine has no CUDA device of its own, there are {torch.cuda.device_count()}; "
            f"start at most {torch.cuda.device_count()} ranks (--nproc-per-node)"
        )
    return torch.device("cuda", index)
