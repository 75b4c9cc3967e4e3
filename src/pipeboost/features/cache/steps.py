"""How many steps each expert of a running call makes, and which settings are its own."""

from __future__ import annotations

from typing import Any

from pipeboost.core.config import CacheConfig
from pipeboost.core.families import Family

LONGEST = 3
"""Steps in a row that the residual may skip, where `max_continuous` does not say."""


def settings_of(settings: CacheConfig, position: int) -> CacheConfig:
    """Return the settings of one expert: `secondary`, where given, is for all but the first."""
    return settings.secondary if position > 0 and settings.secondary is not None else settings


def steps_of_experts(pipe: Any, family: Family) -> tuple[int | None, ...]:
    """Return the steps that each of `family.denoisers` makes in the running call, which is in its loop.

    It is what the loop runs over, not `num_inference_steps`: image-to-image leaves out the first steps. None where the
    pipeline does not say.
    """
    total = getattr(pipe, "num_timesteps", None)
    if total is None:
        return tuple(None for _ in family.denoisers)
    if family.expert_steps is not None:
        return family.expert_steps(pipe)
    return (total, *(0 for _ in family.denoisers[1:]))
