"""`CacheConfig`: what a user can ask of step caching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeboost.core.config_checks import checked_mask, from_mapping, is_number, require_integer, require_one_of
from pipeboost.core.errors import ConfigurationError, quoted

PRESETS = {
    "slow": "slow",
    "medium": "medium",
    "fast": "fast",
    "ultra": "ultra",
    "balanced": "medium",
    "quality": "slow",
}
"""The names of presets → the preset: the last two are other names of the first two."""
STEP_MASKS = tuple(PRESETS)
POLICIES = ("static", "dynamic")
EXTRAPOLATED = ("blocks", "output")


@dataclass(frozen=True)
class CacheConfig:
    """Step caching: in some denoising steps the transformer, or its middle blocks, are not run but extrapolated.

    Attributes:
        extrapolate: `"output"` skips the whole transformer in fixed steps and extrapolates what it returns; `"blocks"`
            runs the first and last blocks and lets cache-dit extrapolate the residual of the others.
        step_mask: fixed steps instead of the residual's decision: a preset for any number of steps,
            `([compute bins], [cache bins])`, run alternately, or with `steps` the computed steps, from 0.
        steps: the number of denoising steps that such a list of computed steps is for.
        taylorseer_order: order of the extrapolation over the steps; None repeats what was computed last.
        max_continuous: skipped steps in a row, at most; None: 3 where the residual decides, any number in a mask.
        fn: blocks at the front that always run; their residual decides.
        bn: blocks at the end that always run.
        warmup: denoising steps at the start that the residual never skips.
        threshold: relative change of the residual below which a step is skipped.
        policy: of the steps that a mask does not compute: `"static"` skips them all, `"dynamic"` where the residual
            allows it, for `"blocks"`.
        guidance_gate: step, from 1, from which on the second guidance branch is not computed: it is then the first one,
            and what it last differed by. For `"output"`; None computes both.
        pipeline: class name of the pipeline that a schedule was tuned on; others are refused.
        latents: elements of what its transformer returned there for one sample; calls with less than half or more than
            twice as many are refused. For `"output"`.
        secondary: settings of the second expert (Wan2.2's low-noise one); None takes these.
    """

    extrapolate: str = "blocks"
    step_mask: str | tuple[tuple[int, ...], tuple[int, ...]] | tuple[int, ...] | None = None
    steps: int | None = None
    taylorseer_order: int | None = None
    max_continuous: int | None = None
    fn: int = 1
    bn: int = 0
    warmup: int = 4
    threshold: float = 0.24
    policy: str = "static"
    guidance_gate: int | None = None
    pipeline: str | None = None
    latents: int | None = None
    secondary: CacheConfig | None = None

    def __post_init__(self) -> None:
        require_one_of("cache.extrapolate", self.extrapolate, EXTRAPOLATED)
        require_integer("cache.fn", self.fn, minimum=1)
        require_integer("cache.bn", self.bn, minimum=0)
        require_integer("cache.warmup", self.warmup, minimum=0)
        if not is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise ConfigurationError(f"cache.threshold={self.threshold!r} must be a number in (0, 1]")
        for name, value, maximum in (
            ("max_continuous", self.max_continuous, None),
            ("taylorseer_order", self.taylorseer_order, 4),
            ("steps", self.steps, None),
            ("guidance_gate", self.guidance_gate, None),
            ("latents", self.latents, None),
        ):
            if value is not None:
                require_integer(f"cache.{name}", value, minimum=1, maximum=maximum)
        mask = checked_mask("cache", self.step_mask, self.steps, STEP_MASKS)
        object.__setattr__(self, "step_mask", PRESETS[mask] if isinstance(mask, str) else mask)
        require_one_of("cache.policy", self.policy, POLICIES)
        if self.policy == "dynamic" and (self.extrapolate == "output" or self.step_mask is None):
            raise ConfigurationError(
                "cache.policy='dynamic' lets the residual of blocks decide in the steps that a mask does not compute; "
                "use it with extrapolate='blocks' and a step_mask"
            )
        if self.extrapolate == "output" and self.step_mask is None:
            raise ConfigurationError(
                "cache.extrapolate='output' skips fixed steps; use it with step_mask='fast', or name the steps"
            )
        for name in ("guidance_gate", "latents"):
            if self.extrapolate == "blocks" and getattr(self, name) is not None:
                raise ConfigurationError(
                    f"cache.{name}={getattr(self, name)} is for whole forwards; use it with extrapolate='output'"
                )
        if not isinstance(self.pipeline, str | None):
            raise ConfigurationError(f"cache.pipeline={quoted(self.pipeline)} must be the class name of a pipeline")
        if isinstance(self.secondary, Mapping):
            object.__setattr__(self, "secondary", from_mapping(CacheConfig, "cache.secondary", self.secondary))
        elif not isinstance(self.secondary, CacheConfig | None):
            raise ConfigurationError(f"cache.secondary={self.secondary!r} must be CacheConfig(...) or None")
        if self.secondary is not None and self.secondary.extrapolate != self.extrapolate:
            raise ConfigurationError(
                f"cache.secondary.extrapolate={self.secondary.extrapolate!r} must be that of the first expert, "
                f"{self.extrapolate!r}"
            )
