"""Requests: calls of one pipeline in threads of their own, started in order, of which consecutive ones overlap.

While two denoise, the next encodes its text and the previous decodes, each on a view of the pipeline and one of two
streams. What runs in each is the same as in a call by itself, so the results are the same to the bit; a request for
which that would not hold runs alone.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import copy
import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from pipeboost.contract.call import current_call, no_call
from pipeboost.core.errors import PipeboostError
from pipeboost.runner import Calls
from pipeboost.stages.call_record import AT_ONCE, CallRecord, recorded_by
from pipeboost.stages.report import Report
from pipeboost.stages.spans import Progress

_Modes = Callable[[], contextlib.AbstractContextManager[None]]
_IN_FLIGHT = AT_ONCE + 2
"""Requests that have a thread: one before its loop and one after it too."""
_STREAMS = 2
"""Two keep a GPU busy; the allocator keeps the memory that a decode frees once for each."""


@dataclass(eq=False, repr=False)
class Request:
    """A call that was submitted: it waits for its turn, runs, or has ended. Any thread may use it."""

    _queue: Requests
    _record: CallRecord
    _run: Callable[[CallRecord], Any] | None
    _generators: Sequence[Any]
    _output: Any = None
    _error: BaseException | None = None

    def __post_init__(self) -> None:
        name = f"pipeboost request {self._queue._submitted}"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._ended = threading.Event()

    def __repr__(self) -> str:
        running = "waiting" if self._record.call is None else "running"
        return f"<Request {'done' if self.done else running}>"

    @property
    def done(self) -> bool:
        """Whether it has returned, failed or been cancelled."""
        return self._ended.is_set()

    @property
    def progress(self) -> Progress | None:
        """The stage it came to last, or the step; None before the first."""
        return self._record.progress

    def on_progress(self, listener: Callable[[Progress], None]) -> None:
        """Call `listener` at the start of each stage and after each denoising step, in the request's own thread.

        What it raises ends the request.
        """
        self._record.listeners.append(listener)

    @property
    def report(self) -> Report | None:
        """Where its time went; None until it has ended, and where it never began."""
        finished = self._record.finished
        return self._queue.calls.report_of(finished) if self.done and finished is not None else None

    def cancel(self) -> None:
        """Make this request raise `Cancelled`: where it waits, or at its next denoising step. Others go on."""
        self._record.cancel()
        self._queue.start()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for its end and return what the call returned.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            Exception: what the call raised.
            Cancelled: it was cancelled.
            TimeoutError: it has not ended by then; it goes on.
            PipeboostError: it has not ended, and this is inside a call of the same pipeline, for which it may wait.
        """
        outer = current_call()
        if outer is not None and outer.owner is self._queue.calls.applied and not self.done:
            raise PipeboostError(
                "a request may wait for the call that this is inside of; take its result after that call, or call the "
                "pipeline itself here"
            )
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the request has not ended within {timeout} s")
        self._thread.join()  # which has ended but for its last line
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # which the error's traceback would keep
        self._queue.calls.finished = self._record.finished or self._queue.calls.finished
        return self._output

    def _work(self) -> None:
        assert self._run is not None
        try:
            with self._record.admitted():
                self._output = self._run(self._record)
        except BaseException as error:  # raised by whoever asks for the result
            self._error = error
            each: BaseException | None = error
            while each is not None:  # what its frames hold, the pipeline among it, is not kept as long as the error
                traceback.clear_frames(each.__traceback__)
                each = each.__cause__ or each.__context__
        finally:
            self._run, self._generators = None, ()
            self._record.listeners.clear()
            self._queue.leave(self)
            self._ended.set()


class Requests:
    """The requests of one accelerated pipeline and of views of it.

    Args:
        calls: make their calls.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._lock = threading.RLock()
        self._under_way: list[Request] = []
        self._submitted = 0

    def submit(self, pipe: Any, call: Mapping[str, Any]) -> Request:
        """Let `pipe(**call)` run in a thread, in its turn."""
        generators = _generators(call)
        with self._lock:
            overlapping = [each for each in self._under_way if not each._record.alone]
            theirs = [generator for each in overlapping for generator in each._generators]
            alone = not self._may_overlap(pipe) or not _are_own([*generators, *theirs])
            self._submitted += 1
            run = _runner(pipe, call, None) if alone else _runner(self._view(pipe), call, self._submitted % _STREAMS)
            record = CallRecord(kept=True)
            self.calls.queue.enter(record, alone=alone, must_run=self.calls.applied.team is not None)
            self.calls.records.add(record)
            request = Request(self, record, run, generators)
            if not self._under_way:
                atexit.register(self._give_up)
            self._under_way.append(request)
            self.start()
        return request

    def run_many(self, pipe: Any, requests: Sequence[Mapping[str, Any]], *, overlap: bool) -> Iterator[Any]:
        """As `Acceleration.run_many`: run `pipe(**request)` for each request and yield what they return, in order."""
        overlap = overlap and len(requests) > 1 and current_call() is None and self._may_overlap(pipe)
        if not overlap or not _are_own([each for request in requests for each in _generators(request)]):
            for request in requests:
                yield pipe(**request)
            return
        waiting: deque[Request] = deque()
        try:
            for request in requests:
                waiting.append(self.submit(pipe, request))
                if len(waiting) == _IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
            for each in waiting:
                with contextlib.suppress(BaseException):
                    each.result()

    def refuse_while_under_way(self) -> None:
        """Raise where a request waits or runs.

        Raises:
            PipeboostError: one does.
        """
        if self._under_way:
            raise PipeboostError("a request of this pipeline is under way; wait for it, or cancel() it, then remove()")

    def _may_overlap(self, pipe: Any) -> bool:
        applied = self.calls.applied
        if not applied.active or self.calls.are_paused or applied.team is not None:
            return False
        if not self._under_way:
            applied.follow_device(pipe)  # which views of the pipeline cannot
        return not applied.plan["offload"].on

    def _view(self, pipe: Any) -> Any:
        """A shallow copy of the pipeline with a scheduler of its own, whose state a call goes through."""
        self.calls.applied.bind(pipe)  # so that its views come with the components that they share
        view = copy.copy(pipe)
        if getattr(pipe, "scheduler", None) is not None:
            view.scheduler = copy.deepcopy(pipe.scheduler)
        return view

    def start(self) -> None:
        """Start the threads of requests that may begin, and of those that are only to raise `Cancelled`."""
        with self._lock:
            for place, request in enumerate(self._under_way):
                if request._thread.ident is None and (place < _IN_FLIGHT or request._record.cancelled):
                    request._thread.start()

    def leave(self, request: Request) -> None:
        """A request has ended, but for saying so."""
        with self._lock:
            self.calls.records.discard(request._record)
            self._under_way.remove(request)
            self.start()
            if not self._under_way:
                atexit.unregister(self._give_up)

    def _give_up(self) -> None:
        """At the end of the program, no thread may be in the middle of a call."""
        with self._lock:
            self._under_way = [request for request in self._under_way if request._thread.ident is not None]
            ending = tuple(self._under_way)
        for request in ending:
            request.cancel()
        for request in ending:
            request._thread.join()


def _runner(pipe: Any, call: Mapping[str, Any], stream: int | None) -> Callable[[CallRecord], Any]:
    """Return `pipe(**call)` for another thread, as in this one; on one of our streams where `stream` is a number."""
    device, context = pipe._execution_device, contextvars.copy_context()
    modes = _modes(device)
    make = functools.partial(pipe, **call)
    if device.type == "cuda":
        callers = torch.cuda.current_stream(device)
        ours = callers if stream is None else _stream(device, stream)
        if ours is not callers:
            ours.wait_stream(callers)
        make = functools.partial(_on_stream, ours, callers, make)
    run: Callable[..., Any] = context.run
    # No closures: a frame in an error's traceback keeps those of its function.
    return functools.partial(run, _make_recorded, make, modes)


def _make_recorded(make: Callable[[], Any], modes: _Modes, record: CallRecord) -> Any:
    with no_call(), recorded_by(record), modes():
        return make()


def _on_stream(stream: torch.cuda.Stream, callers: torch.cuda.Stream, make: Callable[[], Any]) -> Any:
    with torch.cuda.stream(stream):
        result = make()
        stream.record_event().synchronize()
    for tensor in tree_leaves(result):
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(callers)  # which may still read it when the caller lets go of it
    return result


def _modes(device: torch.device) -> _Modes:
    """This thread's modes of torch that a call depends on, to be entered in another thread."""
    kind, gradients, inference = device.type, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextlib.contextmanager
    def modes() -> Iterator[None]:
        cast = torch.autocast(kind, dtype) if casts else contextlib.nullcontext()
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), cast:
            yield

    return modes


def _generators(call: Mapping[str, Any]) -> Sequence[Any]:
    given = call.get("generator")
    return given if isinstance(given, (list, tuple)) else (given,)


def _are_own(generators: Sequence[Any]) -> bool:
    """Whether each draws by itself: a call without a generator draws from the global random state."""
    return None not in generators and len(set(map(id, generators))) == len(generators)


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Kept, as the allocator keeps freed memory for the stream that had it."""
    return torch.cuda.Stream(device)
