"""Whether steps are skipped, and by which rule."""

from __future__ import annotations

from pipeboost.contract.decision import Decision, Decisions, needs_tier
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, CacheConfig, CompileConfig, tier_allows
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose the step cache.

    Raises:
        ConfigurationError: it contradicts the tier or another setting.
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.cache
    if asked is None:
        return Decision("cache", "off", "turned off")
    if not tier_allows(config.quality, "fast"):
        if asked != "auto":
            raise needs_tier("cache", asked, "fast", config.quality)
        return Decision("cache", "off", f"skipping steps is lossy, and tier {config.quality!r} does not allow it")
    if not (family.blocks and family.pipelines):
        unknown = "which forwards a step makes" if family.blocks else "which blocks may be skipped"
        if asked != "auto":
            raise UnsupportedError(
                f"cache needs to know {unknown}, which no family tells for {model.pipeline}; use cache=None or add a "
                "family (entry-point group 'pipeboost.patches')"
            )
        return Decision("cache", "off", f"no family tells {unknown} in {model.pipeline}")
    if model.controlnet:
        if asked != "auto":
            raise UnsupportedError(
                f"cache cannot skip blocks of {model.pipeline}, whose ControlNet adds to the states between them; "
                "use cache=None"
            )
        return Decision("cache", "off", "a ControlNet adds to the states between the blocks, which a cache would skip")
    if isinstance(config.compile, CompileConfig) and config.compile.scope == "full":
        if asked != "auto":
            raise ConfigurationError("cache decides between blocks, which compile='full' does not have; use 'regional'")
        return Decision("cache", "off", "compile='full' leaves no blocks to decide between")
    settings = CacheConfig() if asked == "auto" else asked
    how = (
        f"fixed steps ({settings.step_mask})"
        if settings.step_mask is not None
        else f"a step is skipped while the residual of the first {settings.fn} block(s) moves less than "
        f"{settings.threshold}, at most {settings.max_continuous} in a row, never in the first {settings.warmup}"
    )
    return Decision("cache", "cache-dit", how, settings=settings)
