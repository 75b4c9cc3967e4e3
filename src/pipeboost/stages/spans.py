"""Spans: the stretches of one call, with their times and the memory around them.

Times on CUDA are event pairs, read after the call, so that nothing in the loop waits for the device. Memory is what
torch's allocator counts; a stage's own peak is known where it is the highest so far, and for every stage in a profiled
call, which restarts the allocator's peak counter at each stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot

_COARSE = ("stage", "step")
DENOISING = "denoising"
WHOLE_CALL = "other"
"""The stage of a call's outermost span: what no stage inside it accounts for."""
WAITING = "waiting"
"""The stage of a call that waits for a component while calls before it use it."""


@dataclass
class Span:
    """A stretch of a call.

    Attributes:
        stage: the stage's name.
        what: what it is within the stage: `"stage"`, `"step"`, `"forward"` or `"scheduler"`.
        step: the denoising step it belongs to, None outside the loop.
        branch: the CFG branch of a forward, None elsewhere.
        start: host time, `time.perf_counter` seconds.
        depth: how many spans it is nested in.
        end: host time; 0 while it runs.
        events: CUDA events at start and end, where the call runs on a CUDA device.
        memory_before: bytes allocated on the device at its start; None on a CPU, and for what is within a step.
        memory_after: the same at its end.
        memory_peak: the most bytes in between, where that is known.
    """

    stage: str
    what: str
    step: int | None
    branch: int | None
    start: float
    depth: int
    end: float = 0.0
    events: tuple[Any, Any] | None = None
    memory_before: int | None = None
    memory_after: int | None = None
    memory_peak: int | None = None

    def seconds(self) -> float:
        """Device time where there are events, which must have completed; else host time."""
        if self.events is not None:
            return self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.end - self.start


@dataclass(frozen=True)
class Progress:
    """What a progress callback is called with: at the start of each stage, and after each denoising step.

    Attributes:
        stage: name of the stage.
        step: denoising steps done; None outside the loop.
        steps: steps of the loop; None where not known.
        seconds: host seconds since the call began.
    """

    stage: str
    step: int | None
    steps: int | None
    seconds: float


class Recorder:
    """Opens and closes the spans of one call.

    Args:
        call: the call; spans go to its `events`, in order of their start.
        exact_peaks: restart the allocator's peak counter at each stage.
        progress: called with a `Progress`; what it raises ends the call.
    """

    def __init__(
        self, call: Call, *, exact_peaks: bool = False, progress: Callable[[Progress], None] | None = None
    ) -> None:
        self._call = call
        self._device = call.device
        self._on_cuda = call.device.type == "cuda"
        self._exact_peaks = exact_peaks and self._on_cuda
        self._progress = progress
        self._open: list[Span] = []
        self._peaks_at_start: list[int] = []
        self._began = time.perf_counter()

    def open(self, stage: str, what: str = "stage", *, step: int | None = None, branch: int | None = None) -> Span:
        """Begin a span inside those that are open."""
        if what in _COARSE and self._call.watched is not None:
            self._call.watched.watchdog.enter_stage(stage)
        if what == "stage" and stage != WHOLE_CALL:
            self.notify(stage)
        span = Span(stage, what, step, branch, time.perf_counter(), len(self._open))
        if self._on_cuda:
            torch.cuda.nvtx.range_push(stage if what == "stage" else f"{stage} {what} {step}")
            if what in _COARSE:
                self._note_memory(span, begins=True)
            stream = torch.cuda.current_stream(self._device)
            span.events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            span.events[0].record(stream)
        self._open.append(span)
        self._call.events.append(span)
        return span

    def close(self, span: Span) -> None:
        """End a span, and those inside it that are still open (their loop was left by an exception)."""
        while self._open:
            last = self._open.pop()
            if last.events is not None:
                last.events[1].record(torch.cuda.current_stream(self._device))
                torch.cuda.nvtx.range_pop()
                if last.what in _COARSE:
                    self._note_memory(last, begins=False)
            last.end = time.perf_counter()
            if last is span:
                return

    @contextmanager
    def span(
        self, stage: str, what: str = "stage", *, step: int | None = None, branch: int | None = None
    ) -> Iterator[Span]:
        """Open a span for the length of a `with` block."""
        span = self.open(stage, what, step=step, branch=branch)
        try:
            yield span
        finally:
            self.close(span)

    def current_step(self) -> Span | None:
        """The step that is open, if one is."""
        return next((span for span in reversed(self._open) if span.what == "step"), None)

    def notify(self, stage: str, step: int | None = None) -> None:
        """Call the progress callback: a stage begins, or the loop has done so many steps."""
        if self._progress is not None:
            steps = None if step is None else _steps_of(self._call.pipe)
            self._progress(Progress(stage, step, steps, time.perf_counter() - self._began))

    def _note_memory(self, span: Span, *, begins: bool) -> None:
        """Note the memory at a span's start or end; those still open have all peaks that were counted inside them."""
        now, peak = self._allocated()
        if self._exact_peaks:
            for each in (*self._open, *(() if begins else (span,))):
                if each.memory_peak is not None:
                    each.memory_peak = max(each.memory_peak, peak)
            torch.cuda.reset_peak_memory_stats(self._device)
        if begins:
            span.memory_before = now
            span.memory_peak = now if self._exact_peaks else None
            self._peaks_at_start.append(peak)
        else:
            span.memory_after = now
            if self._peaks_at_start.pop() < peak and not self._exact_peaks:
                span.memory_peak = peak

    def _allocated(self) -> tuple[int, int]:
        """Bytes allocated now and at most; the nested form, because the flat one costs ten times as much."""
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)["allocated_bytes"]["all"]
        return stats["current"], stats["peak"]


RECORDER = Slot[Recorder]()


def _steps_of(pipe: Any) -> int | None:
    """Return how many steps the running loop makes, where the pipeline or its scheduler says."""
    steps: int | None = getattr(pipe, "_num_timesteps", None)
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return len(timesteps) if steps is None and timesteps is not None else steps
