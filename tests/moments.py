"""Work of several threads at once, and moments in which no garbage is collected."""

import concurrent.futures
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def at_once(work: Callable[[T], object], arguments: Sequence[T]) -> None:
    """Run `work` for each argument in a thread of its own, all of them at once; raise what one raised."""
    gate = threading.Barrier(len(arguments))

    def begin(argument: T) -> None:
        gate.wait()
        work(argument)

    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as threads:
        for each in [threads.submit(begin, argument) for argument in arguments]:
            each.result()


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, only what nothing refers to any more is freed, and no cycle is."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def threads_here() -> set[threading.Thread]:
    """All threads but tqdm's monitor, which the first progress bar of a process begins."""
    return {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"}
