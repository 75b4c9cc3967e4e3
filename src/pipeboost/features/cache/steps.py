"""How many steps each expert of a running call makes, and which of them a step mask computes."""

from __future__ import annotations

from typing import Any

from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Family

# Below this, cache-dit's presets exist for the step counts of two distilled models only.
_PRESET_STEPS = 8
_SHORT_PRESET_STEPS = (4, 6)


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


def computed_steps(settings: CacheConfig, steps: int | None) -> list[int] | None:
    """Return the mask of a fixed schedule, 1 where a step is computed, or None where the residual decides.

    Raises:
        ConfigurationError: the preset does not exist for this number of steps, or the bins do not cover it.
        UnsupportedError: there is a schedule, but the number of steps is not known.
    """
    mask = settings.step_mask
    if mask is None or steps == 0:
        return None
    if steps is None:
        raise UnsupportedError(
            f"cache.step_mask={mask!r} needs the number of steps, which the pipeline does not say in num_timesteps; "
            "use step_mask=None"
        )
    from pipeboost.features.cache.library import steps_mask

    if isinstance(mask, str):
        if steps < _PRESET_STEPS and steps not in _SHORT_PRESET_STEPS:
            raise ConfigurationError(
                f"cache.step_mask={mask!r} does not exist for {steps} steps of one transformer; "
                f"use 4, 6, or at least {_PRESET_STEPS} steps, or give ([compute bins], [cache bins])"
            )
        return steps_mask(total_steps=steps, mask_policy=mask)
    compute, cache = mask
    if sum(compute) + sum(cache) < steps:
        raise ConfigurationError(
            f"cache.step_mask={mask!r} covers {sum(compute) + sum(cache)} steps, but one transformer makes {steps}; "
            f"use bins whose sum is at least {steps}"
        )
    return steps_mask(compute_bins=list(compute), cache_bins=list(cache), total_steps=steps)
