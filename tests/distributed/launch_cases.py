"""What the ranks run in `test_launch`."""

import json
import os
import pickle
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pipeboost
from pipeboost.core.errors import ConfigurationError
from pipeboost.distributed import Mesh, suspend_timeout, world
from pipeboost.distributed.authentication import VARIABLE, sign
from pipeboost.distributed.failure.records import Failure, Record
from tests.distributed.failure_cases import Trouble, script


def greeting(word: str, *, mark: str = "!") -> dict[str, Any]:
    """Who this rank is, and the sum of all ranks' numbers."""
    here = world()
    mesh = Mesh({"ulysses": here.size}, device=torch.device("cpu"))
    with mesh.watchdog.watched("greeting", timeout=10):
        total = mesh.group("ulysses").all_reduce(torch.tensor([here.rank + 1.0]))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    return {"word": word + mark, "total": total, **{name: os.environ[name] for name in names}}


def failing(kind: str, rank: int, place: str) -> None:
    """A watched call in which one rank fails."""
    script(Mesh({"ulysses": world().size}, device=torch.device("cpu")), Trouble(kind, rank, place))


def failing_outside() -> None:
    """Rank 1 raises outside all calls while rank 0 sleeps."""
    if world().rank == 0:
        time.sleep(600)
    raise ValueError("boom outside")


def attacked() -> dict[str, Any]:
    """A call during which rank 1 writes what others could to everything that rank 0 listens at, and garbage."""
    forged = Failure(1, "denoising", "the forger's text")
    if world().rank == 1:  # before there is a mesh, and for long enough that rank 0 reads it
        for serial in range(4):
            world().store.set(f"pipeboost rendezvous of (0, 1) about a mesh {serial}: 1", json.dumps(forged._asdict()))
        time.sleep(0.1)
    mesh = Mesh({"ulysses": 2}, device=torch.device("cpu"))
    heartbeat = mesh.watchdog._heartbeat

    def attack() -> None:
        beat = time.monotonic_ns() + 10**12
        for port in (int(os.environ["MASTER_PORT"]), *(store.port for store in heartbeat._others.values())):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(os.urandom(4096))
            store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
            for message in (
                sign(pickle.dumps(Record(beat, failure=forged)), "1", b""),
                b"garbage",
                pickle.dumps(forged),
            ):
                with heartbeat._lock:  # or the rank itself would write over it, maybe always just before rank 0 looks
                    store.set("1", message)
                    time.sleep(0.3)  # longer than between two looks
                time.sleep(0.3)  # in which it says again that it is busy

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        returned = script(mesh, _Interlude(attack))
    return {"returned": returned, "warnings": sum("in rank 1's name" in str(each.message) for each in caught)}


class _Interlude(Trouble):
    """In the middle, rank 1 does something that is known to take a while."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__("interlude", 1, "middle")
        self._action = action

    def at(self, place: str) -> None:
        """Happens here, if this is the rank and the place, once."""
        if place == self.place and world().rank == self.rank:
            self.place = ""
            with suspend_timeout("compiling"):
                self._action()


def launching(folder: str) -> None:
    """Launch ranks that stay; this process can be told to end as from a keyboard."""
    os.environ["TMPDIR"] = os.path.join(folder, "temporary")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipeboost.launch(sleeping, folder, num_gpus=2)


def sleeping(folder: str) -> None:
    """Meet, leave word of this process, and stay; what is kept at Ctrl-C takes a while."""
    rank = world().rank
    mesh = Mesh({"ulysses": world().size}, device=torch.device("cpu"))
    assert os.environ[VARIABLE].encode() not in Path("/proc/self/cmdline").read_bytes()
    Path(folder, f"{rank}.new").write_text(str(os.getpid()))
    Path(folder, f"{rank}.new").rename(Path(folder, str(rank)))
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        with Path(folder, f"kept {rank}").open("a") as kept:
            kept.write("once")
        time.sleep(0.5)
        mesh.close()
        raise


def refusing(alone: int) -> None:
    """`pipeboost generate` on a rank: one refuses, or all do where `alone` is -1; the others load for long."""
    from pipeboost.cli import generate  # which the ranks of other tests need not wait for

    def run_generate() -> None:
        if alone in (-1, world().rank):
            raise ConfigurationError("width=100 cannot be")
        time.sleep(600)

    generate.on_rank(run_generate)
