"""`CacheConfig`: what a user can ask of step caching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeboost.core.config_checks import checked_bins, from_mapping, is_number, require_integer, require_one_of
from pipeboost.core.errors import ConfigurationError

STEP_MASKS = ("slow", "medium", "fast", "ultra")


@dataclass(frozen=True)
class CacheConfig:
    """Step caching by cache-dit: skip the middle blocks when the first ones say that little has changed.

    Attributes:
        fn: blocks at the front that always run; their residual decides.
        bn: blocks at the end that always run.
        warmup: denoising steps at the start that are never skipped.
        threshold: relative change of the residual below which a step is skipped.
        max_continuous: skipped steps in a row, at most.
        taylorseer_order: extrapolate skipped steps by a Taylor series of this order; None reuses the last residual.
        step_mask: fixed steps instead of the residual's decision: a preset of cache-dit, or
            `([compute bins], [cache bins])`, run alternately; `threshold`, `warmup`, `max_continuous` then do nothing.
        secondary: settings of the second expert (Wan2.2's low-noise one); None takes these.
    """

    fn: int = 1
    bn: int = 0
    warmup: int = 4
    threshold: float = 0.24
    max_continuous: int = 3
    taylorseer_order: int | None = None
    step_mask: str | tuple[tuple[int, ...], tuple[int, ...]] | None = None
    secondary: CacheConfig | None = None

    def __post_init__(self) -> None:
        require_integer("cache.fn", self.fn, minimum=1)
        require_integer("cache.bn", self.bn, minimum=0)
        require_integer("cache.warmup", self.warmup, minimum=0)
        require_integer("cache.max_continuous", self.max_continuous, minimum=1)
        if not is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise ConfigurationError(f"cache.threshold={self.threshold!r} must be a number in (0, 1]")
        if self.taylorseer_order is not None:
            require_integer("cache.taylorseer_order", self.taylorseer_order, minimum=1, maximum=4)
        if isinstance(self.step_mask, str):
            require_one_of("cache.step_mask", self.step_mask, STEP_MASKS)
        elif self.step_mask is not None:
            object.__setattr__(self, "step_mask", checked_bins("cache.step_mask", self.step_mask, STEP_MASKS))
        if isinstance(self.secondary, Mapping):
            object.__setattr__(self, "secondary", from_mapping(CacheConfig, "cache.secondary", self.secondary))
        elif not isinstance(self.secondary, CacheConfig | None):
            raise ConfigurationError(f"cache.secondary={self.secondary!r} must be CacheConfig(...) or None")
