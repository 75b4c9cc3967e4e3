"""Ranks that may die: processes of their own for one test, unlike those of `ranks`, which live on."""

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """How a rank ended.

    Attributes:
        answer: what its function returned; None if it died before.
        exit_code: of its process, as `multiprocessing` tells it: negative for a signal.
        seconds: from the start of all ranks to the end of this one.
        printed: on its standard error.
    """

    answer: Any
    exit_code: int
    seconds: float
    printed: str


def on_mortal_ranks(
    count: int,
    function: Callable[..., Any],
    *args: Any,
    limit: float = 60.0,
    stuck: int | None = None,
    tcp: bool = False,
    start: str = "forkserver",
    **kwargs: Any,
) -> list[Outcome]:
    """Run `function(*args, **kwargs)` on `count` ranks at once; how each ended. None is left when this returns.

    Rank `stuck` cannot end by itself: it is killed when the others have ended. With `tcp` rank 0 keeps the store.
    Ranks that use a GPU `start` by `"spawn"`: what they import may have begun to use one, which no fork inherits.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["tests.distributed.preloaded"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        pipes, processes = [], []
        try:
            for rank in range(count):
                ours, theirs = context.Pipe(duplex=False)
                settings = (theirs, rank, count, folder, port if tcp else 0, function, args, kwargs)
                process = context.Process(target=_serve, args=settings)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            return _outcomes(pipes, processes, folder, started, limit, stuck)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _outcomes(
    pipes: list, processes: list, folder: str, started: float, limit: float, stuck: int | None
) -> list[Outcome]:
    answers: dict[int, Any] = {}
    ends: dict[int, float] = {}
    while len(ends) < len(processes):
        if stuck is not None and set(range(len(processes))) - set(ends) == {stuck}:
            processes[stuck].kill()
        left = started + limit - time.monotonic()
        assert left > 0, f"ranks {sorted(set(range(len(processes))) - set(ends))} hang after {limit:.0f} s"
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        alive = [process.sentinel for rank, process in enumerate(processes) if rank not in ends]
        ready = wait([*open_pipes, *alive], left)
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            if pipe in ready:
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = None
            elif process.sentinel in ready:
                ends[rank] = time.monotonic() - started
                process.join()
    printed = []
    for rank in range(len(processes)):
        with open(os.path.join(folder, f"stderr-{rank}"), encoding="utf-8", errors="replace") as file:
            printed.append(file.read())
    return [
        Outcome(answers.get(rank), process.exitcode, ends[rank], printed[rank])
        for rank, process in enumerate(processes)
    ]


def _serve(pipe: Any, rank: int, count: int, folder: str, tcp: int, function: Any, args: Any, kwargs: Any) -> None:
    import torch
    import torch.distributed as dist

    with open(os.path.join(folder, f"stderr-{rank}"), "wb") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    if tcp:
        store: dist.Store = dist.TCPStore("127.0.0.1", tcp, None, rank == 0, wait_for_workers=False)
    else:
        store = dist.FileStore(os.path.join(folder, "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    pipe.send(function(*args, **kwargs))
