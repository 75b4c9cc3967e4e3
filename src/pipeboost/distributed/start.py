"""The world: the ranks that torchrun, our own launcher or the user's script has started, and where they meet.

At a rendezvous, before ranks make groups, each makes sure that the others have arrived, or learns why one will not.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pipeboost.core.errors import ConfigurationError, PipeboostError, quoted
from pipeboost.distributed.authentication import ForgeryError, shared_secret, sign, verify
from pipeboost.distributed.failure.records import Failure, failure_from
from pipeboost.distributed.local_processes import STAGE, Absence, Process, patience, this_process

T = TypeVar("T")

_PROCESS = "pipeboost process of rank {}"
_serials: Counter[tuple[str, tuple[int, ...]]] = Counter()


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


def announce() -> None:
    """Tell the other ranks which process this is, so that they notice should it die before a rendezvous."""
    _write(_PROCESS.format(world().rank), this_process()._asdict())


def rendezvous(about: str, ranks: Sequence[int], word: str) -> list[str]:
    """Wait until all of these ranks of the world have come here as often as this one.

    Args:
        about: what they meet about; rendezvous about other things are counted by themselves.
        ranks: of the world, in the same order on all of them.
        word: that this one brings.

    Returns:
        The word that each of them has brought.

    Raises:
        RankFailedError: one has declined, or died.
        PipeboostError: some did not come, or the store does not answer.
    """
    place = _come(about, ranks, {"word": word})
    words: dict[int, str] = {}
    absence, until = Absence(_process_of), time.monotonic() + patience()
    while missing := [rank for rank in ranks if rank not in words]:
        for rank in missing:
            message = _read(f"{place} {rank}")
            if message is not None and "word" not in message:
                raise Failure(**message).error()
            if message is not None:
                words[rank] = message["word"]
        if time.monotonic() > until:
            # As if it had not been here: the next time it comes it meets whoever comes for the first time.
            answer_of_store(lambda: world().store.delete_key(f"{place} {world().rank}"))
            _serials[about, tuple(ranks)] -= 1
            raise PipeboostError(
                f"rank {', '.join(map(str, missing))} did not come to {STAGE} within {patience():.0f} s; every rank "
                "calls it at the same point of its program, or uses parallel=None"
            )
        absence.check(missing)
        time.sleep(0.02)
    return [words[rank] for rank in ranks]


def decline(about: str, ranks: Sequence[int], error: Exception) -> None:
    """Tell the ranks that come to the next rendezvous why this one does not, without waiting for them."""
    _come(about, ranks, failure_from(error, world().rank, STAGE)._asdict())


def _come(about: str, ranks: Sequence[int], message: dict[str, Any]) -> str:
    """Leave a message at the next rendezvous; return where those of all ranks are found, before their numbers."""
    members = tuple(ranks)
    place = f"pipeboost rendezvous of {members} about {about} {_serials[about, members]}:"
    _serials[about, members] += 1
    _write(f"{place} {world().rank}", message)
    return place


def _process_of(rank: int) -> Process | None:
    message = _read(_PROCESS.format(rank))
    return None if message is None else Process(**message)


def _write(key: str, message: dict[str, Any]) -> None:
    signed = sign(json.dumps(message).encode(), key, shared_secret())
    answer_of_store(lambda: world().store.set(key, signed))


def _read(key: str) -> dict[str, Any] | None:
    """What a rank has left in the store; what others left there counts as nothing."""
    store = world().store
    try:
        content = answer_of_store(lambda: store.get(key) if store.check([key]) else b"")
        message: dict[str, Any] = json.loads(verify(content, key, shared_secret()))
    except dist.DistError as error:
        raise PipeboostError(f"the store where the ranks meet cannot be reached any more: {error}") from error
    except (ForgeryError, ValueError):
        return None
    return message
