"""Ranks to run tests on: processes with a gloo group, started once and used by many tests.

    from tests.distributed.ranks import on_ranks

    results = on_ranks(4, tests.distributed.some_cases.case, "flux", cfg=2)    # what each rank returned, in order

What runs on the ranks is a function of an importable module (`tests.distributed.…_cases`); it returns something that
can be pickled. A rank that raises makes `on_ranks` raise with its traceback, and the ranks are started anew for the
next test.
"""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

LIMIT = 120.0
_pools: dict[int, "_Ranks"] = {}


def on_ranks(count: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT, **kwargs: Any) -> list[Any]:
    """Run `function(*args, **kwargs)` on `count` ranks at once; what each returned, in order."""
    if count not in _pools:
        _pools[count] = _Ranks(count)
    try:
        return _pools[count].run(function, args, kwargs, limit)
    except BaseException:
        _pools.pop(count).stop()
        raise


class RankError(Exception):
    """A rank raised, died or did not answer; the message has its traceback."""


class _Ranks:
    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preloaded"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            settings = (theirs, rank, count, os.path.join(self._folder.name, "store"))
            process = context.Process(target=_serve, args=settings, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any, limit: float) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results, failed = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(limit if not failed else 5.0):
                    failed.append(f"rank {rank} did not answer within {limit:.0f} s")
                    continue
                ok, result = pipe.recv()
            except (EOFError, ConnectionResetError):
                self._processes[rank].join(5)
                failed.append(f"rank {rank} died with exit code {self._processes[rank].exitcode}")
                continue
            (results if ok else failed).append(result if ok else f"rank {rank}:\n{result}")
        if failed:
            raise RankError("\n".join(failed))
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        self._folder.cleanup()


def _serve(pipe: Any, rank: int, count: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()
