"""Times and memory of repeated forwards: CUDA events on a GPU, the host clock on a CPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UPS = 2


@dataclass(frozen=True)
class Timing:
    """Times of repeated runs, in milliseconds, in the order they were taken."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.milliseconds)


def time_runs(
    run: Callable[[], Any], device: torch.device, *, repeats: int, warm_ups: int = WARM_UPS
) -> tuple[Timing, Any]:
    """Warm up, then time `repeats` runs back to back, as the steps of a denoising loop follow each other.

    On CUDA the peak of allocated memory is reset before the timed runs.

    Returns:
        The times, and what the last run returned.
    """
    for _ in range(warm_ups):
        result = run()
    if device.type != "cuda":
        milliseconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            result = run()
            milliseconds.append((time.perf_counter() - start) * 1e3)
        return Timing(tuple(milliseconds)), result
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        result = run()
        event.record()
    synchronize(device)
    return Timing(tuple(a.elapsed_time(b) for a, b in itertools.pairwise(events))), result


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes on the GPU since the timed runs began, weights included; None on a CPU.

    A CUDA graph replays in memory of its own that the allocator does not count as in use: that is added.
    """
    if device.type != "cuda":
        return None
    graphs = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )
    return torch.cuda.max_memory_allocated(device) + graphs


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
