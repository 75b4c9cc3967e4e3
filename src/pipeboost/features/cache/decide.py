"""Whether steps are skipped, and by which rule."""

from __future__ import annotations

from pipeboost.contract.decision import Decision, Decisions, needs_tier
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, CacheConfig, CompileConfig, tier_allows
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware
from pipeboost.features.cache.steps import LONGEST

AUTO = CacheConfig(extrapolate="output", step_mask="fast", taylorseer_order=1)
"""What tier `fast` does by itself."""


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
    settings = AUTO if asked == "auto" else asked
    against = _obstacle(settings, config, model, family) or _obstacle_to_gate(settings, model, family, earlier)
    if against is not None:
        if asked != "auto":
            raise against
        return Decision("cache", "off", str(against))
    skips = "the transformer" if settings.extrapolate == "output" else "the middle blocks"
    order = settings.taylorseer_order
    how = "its last result stands in" if order is None else f"its results are extrapolated with order {order}"
    quiet = (
        f"while the residual of the first {settings.fn} block(s) moves less than {settings.threshold}, at most "
        f"{settings.max_continuous or LONGEST} in a row"
    )
    if isinstance(settings.step_mask, str):
        mask = f"{settings.step_mask}, placed as outputs of the demo model ask for, not measured on other models"
    else:
        mask = "as listed" if settings.pipeline is None else f"as tuned on {settings.pipeline}"
    if settings.step_mask is None:
        when = f"in the residual's quiet steps: {quiet}, never in the first {settings.warmup}"
    else:
        when = f"in fixed steps ({mask}){f', {quiet}' if settings.policy == 'dynamic' else ''}"
    how += _gate_in_words(settings)
    choice = "outputs" if settings.extrapolate == "output" else "cache-dit"
    return Decision("cache", choice, f"{skips} is skipped {when}; {how}", settings=settings)


def _gate_in_words(settings: CacheConfig) -> str:
    gates = {"": settings.guidance_gate}
    if settings.secondary is not None:
        gates = {" of the first expert": settings.guidance_gate, " of the second": settings.secondary.guidance_gate}
    words = " and ".join(f"{gate}{expert}" for expert, gate in gates.items() if gate is not None)
    gated = f"; from step {words} on, the second guidance branch is the first one and what it last differed by"
    return gated if words else ""


def _obstacle(
    settings: CacheConfig, config: AccelerationConfig, model: ModelInfo, family: Family
) -> ConfigurationError | UnsupportedError | None:
    blocks = settings.extrapolate == "blocks"
    for tuned in (settings.pipeline, settings.secondary and settings.secondary.pipeline):
        if tuned not in (None, model.pipeline):
            return ConfigurationError(
                f"cache.pipeline={tuned!r} is what this schedule was tuned on, and this is {model.pipeline}; tune it "
                "anew, or leave out pipeline"
            )
    if not (family.pipelines and (family.blocks or not blocks)):
        unknown = "which forwards a step makes" if not family.pipelines else "which blocks may be skipped"
        return UnsupportedError(
            f"cache needs to know {unknown}, which no family tells for {model.pipeline}; use cache=None or add a "
            "family (entry-point group 'pipeboost.patches')"
        )
    if blocks and model.controlnet:
        return UnsupportedError(
            f"cache cannot skip blocks of {model.pipeline}, whose ControlNet adds to the states between them; "
            "use extrapolate='output' or cache=None"
        )
    if blocks and isinstance(config.compile, CompileConfig) and config.compile.scope == "full":
        return ConfigurationError("cache decides between blocks, which compile='full' does not have; use 'regional'")
    return None


def has_separate_branches(family: Family) -> bool:
    """Whether a step's guidance branches are forwards of their own, the first one with the prompt."""
    return family.prediction is not None and family.batched is None


def _obstacle_to_gate(
    settings: CacheConfig, model: ModelInfo, family: Family, earlier: Decisions
) -> UnsupportedError | None:
    gates = settings.guidance_gate, settings.secondary and settings.secondary.guidance_gate
    if gates == (None, None):
        return None
    if not has_separate_branches(family):
        known = "are one batch" if family.batched is not None else "no family describes"
        return UnsupportedError(
            f"cache.guidance_gate needs guidance branches that are forwards of their own, and those of "
            f"{model.pipeline} {known}; use guidance_gate=None"
        )
    if earlier["parallel"].on and earlier["parallel"].settings.cfg > 1:
        return UnsupportedError(
            f"cache.guidance_gate leaves the ranks of the second guidance branch without work under "
            f"{earlier['parallel'].choice}; use ParallelConfig(cfg=1, ulysses=...) or guidance_gate=None"
        )
    return None
