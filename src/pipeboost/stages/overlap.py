"""Overlap: a list of requests in threads, each with its own view of the pipeline, on two streams.

While two requests denoise, the next encodes its text and the previous decodes. What runs in each request is the same
as in a call by itself, so the results are the same to the bit.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from pipeboost.stages.admission import Turn, Turns

Result = TypeVar("Result")

AT_ONCE = 2
"""Requests in their loops at a time: the kernels of one fill the gaps between those of the other."""
STREAMS = 2
"""Two keep a GPU busy; the allocator keeps the memory that a decode frees once for each."""

_turn: ContextVar[Turn | None] = ContextVar("pipeboost_turn", default=None)


def current_turn() -> Turn | None:
    """The turn of the request that this thread runs, or None."""
    return _turn.get()


def one_by_one(requests: Sequence[Mapping[str, Any]]) -> str | None:
    """Why these requests cannot overlap and give the same results; None where they can."""
    generators = [request.get("generator") for request in requests]
    flat = [g for given in generators for g in (given if isinstance(given, (list, tuple)) else (given,))]
    if any(generator is None for generator in flat):
        return "a request without a generator draws from the global random state, in the order of the requests"
    if len({id(generator) for generator in flat}) < len(flat):
        return "requests share a generator, so each draws what the one before it left"
    return None


def overlapped(
    pipe: Any,
    requests: Sequence[Mapping[str, Any]],
    call: Callable[[Any, Mapping[str, Any]], Result],
    cancel: Callable[[Turns], None],
) -> Iterator[Result]:
    """Run `call(view of pipe, request)` for each request and yield what it returns, in order.

    Args:
        cancel: makes the calls of these turns raise; used where a request failed or the iteration was given up.
    """
    turns = Turns(at_once=AT_ONCE)
    in_flight = AT_ONCE + 2  # one before its loop and one after it
    device = pipe._execution_device
    callers = torch.cuda.current_stream(device) if device.type == "cuda" else None
    streams = [] if callers is None else [_stream(device, number) for number in range(STREAMS)]
    if callers is not None:
        for stream in streams:
            stream.wait_stream(callers)

    def run(position: int, view: Any) -> Result:
        turn = Turn(turns, position)
        try:
            turn.wait_to_start()
            _turn.set(turn)
            if callers is None:
                return call(view, requests[position])
            stream = streams[position % STREAMS]
            with torch.cuda.stream(stream):
                result = call(view, requests[position])
                stream.record_event().synchronize()
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                    tensor.record_stream(callers)  # which may still read it when the caller lets go of it
            return result
        finally:
            turn.end()

    with ThreadPoolExecutor(in_flight, thread_name_prefix="pipeboost-overlap") as pool:
        waiting: list[Future[Result]] = []
        try:
            for position in range(len(requests) + in_flight):
                if position < len(requests):
                    waiting.append(pool.submit(contextvars.copy_context().run, run, position, _view(pipe)))
                if position >= in_flight - 1 and waiting:
                    yield waiting.pop(0).result()
        finally:
            if waiting:
                turns.stop()
                for future in waiting:
                    future.cancel()
                cancel(turns)
                for future in waiting:
                    with contextlib.suppress(BaseException):
                        future.result()


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Kept, as the allocator keeps freed memory for the stream that had it."""
    return torch.cuda.Stream(device)


def _view(pipe: Any) -> Any:
    """A shallow copy of the pipeline with a scheduler of its own, whose state a call goes through."""
    view = copy.copy(pipe)
    if getattr(pipe, "scheduler", None) is not None:
        view.scheduler = copy.deepcopy(pipe.scheduler)
    return view
