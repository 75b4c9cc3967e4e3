"""Step masks: which steps of an expert are computed, and which are extrapolated, before the call has begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat, zip_longest
from typing import Any

from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError

COMPUTED_SHARE: Mapping[str, float] = {"slow": 0.6, "medium": 0.45, "fast": 0.36, "ultra": 0.25}
"""The share of an expert's steps that a preset computes."""
_DENSER_AT_THE_START = 1.65
"""The k-th of n computed steps is at (k / n) to this power: an early error changes what the picture becomes.

Of the powers tried on the demo model it left the fewest pictures far from stock's; docs/caching.md has the numbers.
"""


def computed_steps(settings: CacheConfig, steps: int | None) -> list[int] | None:
    """Return the mask of a fixed schedule, 1 where a step is computed, or None where the residual decides.

    The first step is always computed, and no more than `settings.max_continuous` steps in a row are skipped; where the
    residual has a say in a mask's steps, it sees to that.

    Args:
        settings: of the expert.
        steps: that the expert makes in this call; None where the pipeline does not say.

    Raises:
        ConfigurationError: the schedule is for another number of steps, or skips more of them in a row than it may.
        UnsupportedError: there is a schedule, but the number of steps is not known.
    """
    schedule, limit = settings.step_mask, settings.max_continuous if settings.policy == "static" else None
    if schedule is None or steps == 0:
        return None
    if steps is None:
        raise UnsupportedError(
            f"cache.step_mask={schedule!r} needs the number of steps, which the pipeline does not say in "
            "num_timesteps; use step_mask=None"
        )
    if isinstance(schedule, str):
        return _preset(schedule, steps, limit)
    mask = _listed(schedule, steps, settings.steps) if settings.steps is not None else _binned(schedule, steps)
    longest = max(map(len, "".join(map(str, mask)).split("1")))
    if limit is not None and longest > limit:
        raise ConfigurationError(
            f"cache.step_mask={schedule!r} skips {longest} steps in a row, more than "
            f"cache.max_continuous={limit}; raise it or use other steps"
        )
    return mask


def _preset(name: str, steps: int, max_continuous: int | None) -> list[int]:
    count = max(min(2, steps), round(COMPUTED_SHARE[name] * steps))  # two make a line
    mask = [0] * steps
    place = -1
    for k in range(count):
        place = max(place + 1, round(steps * (k / count) ** _DENSER_AT_THE_START))
        mask[place] = 1
    skipped = 0
    for step, computed in enumerate(mask):
        if not computed and skipped == max_continuous:
            mask[step] = computed = 1
        skipped = 0 if computed else skipped + 1
    return mask


def _listed(computed: Sequence[object], steps: int, known: int) -> list[int]:
    if steps != known:
        raise ConfigurationError(
            f"cache.step_mask={computed!r} is for {known} steps, but one transformer makes {steps} in this call; use "
            f"num_inference_steps={known}, or a preset, which serves any number"
        )
    return [int(step in computed) for step in range(steps)]


def _binned(bins: Any, steps: int) -> list[int]:
    compute, skip = bins
    total = sum(compute) + sum(skip)
    if total < steps:
        raise ConfigurationError(
            f"cache.step_mask={bins!r} covers {total} steps, but one transformer makes {steps}; "
            f"use bins whose sum is at least {steps}"
        )
    runs = chain.from_iterable(zip_longest(compute, skip, fillvalue=0))
    mask = chain.from_iterable(repeat(1 - place % 2, run) for place, run in enumerate(runs))
    return list(mask)[:steps]
