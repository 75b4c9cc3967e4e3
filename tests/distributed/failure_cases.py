"""What the ranks run in `test_failures`."""

import contextlib
import os
import signal
import threading
import time
from typing import Any

import torch

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed import Group, Mesh, announce, local_processes, start, suspend_timeout, world

TIMEOUT = 1.5
"""Seconds that ranks wait for each other."""
PLACES = {"start": "text encoding", "middle": "denoising", "operator": "denoising", "end": "decoding"}
"""Where a rank may fail in `script`, and the stage that it is in there."""


class Trouble:
    """What befalls one rank at one place."""

    def __init__(self, kind: str = "none", rank: int = 0, place: str = "") -> None:
        self.kind = kind
        self.rank = rank
        self.place = place

    def at(self, place: str) -> None:
        """Happens here, if this is the rank and the place."""
        if place != self.place or (self.rank >= 0 and world().rank != self.rank):
            return
        if self.kind.endswith(" later"):  # when the others have had news
            time.sleep(0.3)
            self.kind = self.kind.removesuffix(" later")
        if self.kind == "raise":
            raise ValueError(f"boom on rank {world().rank}")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "stop busy":
            with suspend_timeout("compiling"):
                time.sleep(1.5 * TIMEOUT)
                os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "exit":
            os._exit(3)
        if self.kind == "sleep":
            time.sleep(600)
        if self.kind == "compile":
            self.kind = "none"
            with suspend_timeout("compiling"):
                time.sleep(2 * TIMEOUT)


_trouble = Trouble()


@torch.library.custom_op("pipeboost_tests::troubled", mutates_args=())
def troubled(tensor: torch.Tensor) -> torch.Tensor:
    """An operator in which a rank may fail."""
    _trouble.at("operator")
    return tensor.clone()


def script(mesh: Mesh, trouble: Trouble) -> float:
    """A call as pipelines make them: some stages, with collectives of all kinds in between."""
    global _trouble
    _trouble = trouble
    with mesh.watchdog.watched("text encoding", timeout=TIMEOUT):
        group, ring = mesh.group("ulysses"), mesh.group("ring")
        trouble.at("start")
        mesh.control.all_gather_objects("prompt")
        mesh.watchdog.enter_stage("denoising")
        latents = torch.ones(2)
        for _ in range(3):
            latents = group.all_reduce(latents) / group.size
            trouble.at("middle")
            latents = ring.all_reduce(latents) / ring.size
            pending = group.shift([latents], [incoming := torch.empty(2)])
            latents = troubled(latents)
            pending.wait()
            latents = group.all_gather(incoming, 0, [2] * group.size)[:2]
        mesh.watchdog.enter_stage("decoding")
        trouble.at("end")
        time.sleep(0.05)
        return latents.sum().item()


def failing_call(size: int, kind: str, rank: int, place: str) -> dict[str, Any]:
    """A call in which one rank fails (all if `rank` is -1), the next one, and one of a mesh that was made anew.

    Returns:
        What each call raised, or returned.
    """
    degrees = {"ulysses": 2, "ring": size // 2}
    mesh = Mesh(degrees, device=torch.device("cpu"))
    before = time.monotonic()
    calls = {"first": outcome(lambda: script(mesh, Trouble(kind, rank, place)))}
    calls["first"]["seconds"] = time.monotonic() - before
    threads = _threads()
    calls["second"] = outcome(lambda: script(mesh, Trouble()))
    mesh.close()
    if kind == "raise":
        calls["anew"] = outcome(lambda: script(Mesh(degrees, device=torch.device("cpu")), Trouble()))
    return {**calls, "threads": threads}


def failing_call_between_machines(kind: str, rank: int, place: str) -> dict[str, Any]:
    """`failing_call` on two ranks that cannot see each other's processes."""
    here = f"machine {world().rank}"
    local_processes._host = lambda: here
    return failing_call(2, kind, rank, place)


def aborting() -> bool:
    """Whether what waits for rank 2, which stands still, ends with its group, of which rank 1 has gone."""
    group = Group((0, 1, 2), "cpu")
    group.all_reduce(torch.ones(1))
    if world().rank == 1:
        os._exit(0)
    if world().rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    with contextlib.suppress(RuntimeError):  # until it has gone
        group.backend.recv([torch.empty(1)], 1, 7).wait()
    ended = threading.Event()

    def receive() -> None:
        with contextlib.suppress(RuntimeError):
            group.backend.recv([torch.empty(1)], 2, 7).wait()
        ended.set()

    threading.Thread(target=receive, daemon=True).start()
    time.sleep(0.1)
    group.abort()
    return ended.wait(10)


def killed_before_rendezvous() -> dict[str, Any]:
    """Rank 1 dies after it has begun, and before it meets the other."""
    announce()
    if world().rank == 1:
        world().store.wait(["rank 0 comes"])
        time.sleep(0.5)  # it has looked which process this is
        os.kill(os.getpid(), signal.SIGKILL)
    world().store.set("rank 0 comes", "")
    return outcome(lambda: Mesh({"ulysses": 2}, device=torch.device("cpu")))


def stopped_before_rendezvous() -> list[dict[str, Any]]:
    """Rank 0, which keeps the store, stands still before it meets the other."""
    start.patience = lambda: 1.0
    if world().rank == 0:
        world().store.wait(["rank 1 comes"])
        os.kill(os.getpid(), signal.SIGSTOP)
    world().store.set("rank 1 comes", "")
    time.sleep(0.3)
    return [outcome(lambda: Mesh({"ulysses": 2}, device=torch.device("cpu"))) for _ in range(2)]


def uncaught(rank: int) -> None:
    """A call in which one rank raises, and nobody catches it."""
    script(Mesh({"ulysses": 2}, device=torch.device("cpu")), Trouble("raise", rank, "middle"))


def slow_but_busy() -> float:
    """A call in which rank 1 compiles for longer than ranks wait."""
    return script(Mesh({"ulysses": 2}, device=torch.device("cpu")), Trouble("compile", 1, "middle"))


def left_over() -> dict[str, int]:
    """How many threads and open files there are more after many calls, their mesh closed, than after one."""
    mesh = Mesh({"ulysses": 2}, device=torch.device("cpu"))
    script(mesh, Trouble())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        script(mesh, Trouble())
    return {"threads": len(_threads()), "descriptors": len(os.listdir("/proc/self/fd")) - before}


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "pipeboost" in thread.name]


def outcome(call: Any) -> dict[str, Any]:
    """What a call returned, or raised."""
    try:
        return {"returned": call()}
    except (PipeboostError, ValueError, TypeError) as error:
        names = ("rank", "stage", "signal", "traceback")
        return {"raised": type(error).__name__, "text": str(error), **{n: getattr(error, n, None) for n in names}}
