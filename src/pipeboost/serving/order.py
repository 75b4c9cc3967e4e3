"""`Order`: which of the waiting jobs runs next, and how long the worker takes for one.

Owners share the worker's seconds: the next job is of the one who had the least. Of an owner's jobs the shortest comes
first, unless another has waited long for its length.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pipeboost.serving.jobs import Call, Job, ModelCard

AGEING = 3.0
"""How many times the predicted seconds of a job later ones of its owner can be made and still run before it."""
HALF_LIFE = 600.0
"""Seconds after which half of what an owner had is forgotten."""
SECONDS_PER_UNIT = 2e-7
"""What one pixel of one frame in one step costs before anything was learned: a large model on a fast GPU."""
_SAMPLES = 15


class _Size(NamedTuple):
    """What calls must have in common to cost as much for each unit; attention makes large ones dearer."""

    octave: int
    branches: int
    cache: str | None


class Order:
    """Decides what runs next, and predicts. Not for several threads.

    Args:
        policy: `"fair"`, or `"fifo"`: in the order in which they came.
    """

    def __init__(self, policy: Literal["fair", "fifo"]) -> None:
        self._policy = policy
        self._spent: dict[str, tuple[float, float]] = {}
        self._floor = (0.0, 0.0)
        self._now = 0.0
        self._card: ModelCard | None = None
        self._learned: dict[_Size, deque[float]] = {}

    def predict(self, call: Call, card: ModelCard) -> float:
        """Return how many seconds the worker will take for all of a call's outputs, by what it took for others."""
        self._card = card
        size, units = _size(call, card)
        return units * self._seconds_per_unit(size)

    def _seconds_per_unit(self, size: _Size) -> float:
        if not self._learned:
            return SECONDS_PER_UNIT
        nearest = min(
            self._learned,
            key=lambda other: (
                abs(other.octave - size.octave),
                other.branches != size.branches,
                other.cache != size.cache,
            ),
        )
        return statistics.median_low(self._learned[nearest])

    def learn(self, job: Job) -> None:
        """Note what a completed job took; the median of the last ones counts, so that a slow one changes little.

        One that `predict` was never called before teaches nothing: what it made is known by the model's card alone.
        """
        if self._card is None or job.result is None or job.result.seconds <= 0:
            return
        size, units = _size(job.call, self._card, steps=job.result.steps)
        self._learned.setdefault(size, deque(maxlen=_SAMPLES)).append(job.result.seconds / units)

    def next(self, queued: Sequence[Job], now: float) -> Job | None:
        """Return the job to run next; None where none waits.

        Args:
            queued: the jobs that wait, the earliest first.
            now: seconds since the epoch.
        """
        if not queued or self._policy == "fifo":
            return queued[0] if queued else None
        self._now = max(self._now, now)
        self._admit({job.owner for job in queued})
        chosen = min(queued, key=lambda job: (self._had(job.owner), job.created + AGEING * self._cost(job)))
        self._floor = (self._had(chosen.owner), self._now)
        return chosen

    def _admit(self, owners: set[str]) -> None:
        """Let who comes anew begin at what the one served last had had, so that unused seconds are no claim."""
        floor = self._left_of(self._floor)
        for owner in owners:
            self._spent[owner] = (max(floor, self._had(owner)), self._now)
        for owner in [owner for owner in self._spent if owner not in owners and self._had(owner) < 1e-3]:
            del self._spent[owner]

    def spent(self, owner: str, seconds: float) -> None:
        """Note what the worker spent on an owner's job, whatever became of it."""
        self._spent[owner] = (self._had(owner) + seconds, self._now)

    def _had(self, owner: str) -> float:
        return self._left_of(self._spent.get(owner, (0.0, self._now)))

    def _left_of(self, noted: tuple[float, float]) -> float:
        seconds, at = noted
        return seconds * 0.5 ** ((self._now - at) / HALF_LIFE)

    def waiting(self, ahead: Sequence[Job], running: Job | None, now: float) -> float:
        """Return after how many seconds the worker will be free for one more job.

        Args:
            ahead: the jobs that run before it; all that wait, where it comes last.
            running: the job that runs now.
            now: seconds since the epoch.
        """
        return sum(map(self._cost, ahead)) + (self._rest(running, now) if running is not None else 0.0)

    def _rest(self, job: Job, now: float) -> float:
        cost = self._cost(job)
        elapsed = max(0.0, now - job.started) if job.started is not None else 0.0
        if job.step and job.steps:
            return cost * (1 - min(1.0, job.step / job.steps))
        return max(0.0, cost - elapsed)

    def _cost(self, job: Job) -> float:
        """Return the seconds of a job as they are predicted now, where more is known than when it was made."""
        return self.predict(job.call, self._card) if self._card is not None and self._learned else job.cost


def _size(call: Call, card: ModelCard, *, steps: int | None = None) -> tuple[_Size, float]:
    """Return what a call costs as much as, and in how many units: pixels times frames, steps and branches."""
    one_frame = 1 if card.kind == "image" else card.num_frames
    pixels = (call.width or card.width) * (call.height or card.height) * (call.num_frames or one_frame)
    branches = _branches(call, card)
    steps = steps or call.num_inference_steps or card.num_inference_steps
    size = _Size(round(math.log2(max(1, pixels))), branches, call.cache)
    return size, float(max(1, pixels) * max(1, steps) * branches * max(1, call.count))


def _branches(call: Call, card: ModelCard) -> int:
    """Return how many forwards a step makes, as far as the call's own values show it: two with guidance."""
    if "negative_prompt" not in card.parameters:
        return 1
    if "true_cfg_scale" in card.parameters:
        scale = call.arguments.get("true_cfg_scale")
        off = isinstance(scale, (int, float)) and scale <= 1
        return 2 if call.negative_prompt is not None and not off else 1
    return 2 if call.guidance_scale is None or call.guidance_scale > 1 else 1
