"""Measures whether a graph pays: what share of a forward its launches take, and a trial of replays against eager."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch

LAUNCH_BOUND = 0.9
"""Share of a forward's time on the device that the host takes to launch it, from which on a graph is sure to pay."""
WORTH_TRYING = 0.1
"""The same share, below which the gaps between kernels are too small a part of it for a trial."""

_ROUND = 2
"""Replays and as many eager forwards, in turn, after which the trial looks at its times."""
_MOST_ROUNDS = 3
_LEAST_GAIN = 0.005
"""Share of a forward that a graph saves at least; less is not worth its memory."""


class Trial:
    """Forwards of one signature that are timed on the device, the host not waiting for it.

    Replays and eager forwards take turns, as the device's clock falls while it warms up. Two of each are enough where
    all of one kind are faster than all of the other; else it goes on, and the medians decide in the end.
    """

    def __init__(self) -> None:
        self._replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._eager: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._medians = (0.0, 0.0)

    @property
    def replays(self) -> bool:
        """Whether the next forward is to be a replay."""
        return len(self._replays) <= len(self._eager)

    @contextlib.contextmanager
    def timed(self, *, replay: bool) -> Iterator[None]:
        """Inside, a forward is put on the current stream; forwards of other threads may be so meanwhile."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        (self._replays if replay else self._eager).append((start, end))

    def saving(self, slowest: Callable[[list[float]], list[float]]) -> float | None:
        """Return the milliseconds that a replay saves, at most 0 where it does not pay; None while that is open.

        Waits for the device at the end of a round.

        Args:
            slowest: given this rank's times, returns those of the rank that took longest.
        """
        count = min(len(self._replays), len(self._eager))
        if count == 0 or count % _ROUND or not self.replays:
            return None
        events = self._replays[:count] + self._eager[:count]
        for _, end in events:  # on the streams of several threads they end in any order
            end.synchronize()
        times = slowest([start.elapsed_time(end) for start, end in events])
        replays, eager = times[:count], times[count:]
        self._medians = median(replays), median(eager)
        saved = self._medians[1] - self._medians[0]
        apart = max(replays) < min(eager) or max(eager) < min(replays)
        if not apart and count < _ROUND * _MOST_ROUNDS:
            return None
        return saved if saved >= _LEAST_GAIN * self._medians[1] else 0.0

    def description(self) -> str:
        """Return the medians of both kinds as `saving` found them, for a report."""
        return "{:.1f} ms replayed, {:.1f} ms without".format(*self._medians)


def with_launch_share(
    run: Callable[..., Any], device: torch.device, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, float]:
    """Run a forward while the device waits for nothing else; return its output and its launch share."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    begin = time.perf_counter()
    output = run(*args, **kwargs)
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return output, host * 1e3 / start.elapsed_time(end)
