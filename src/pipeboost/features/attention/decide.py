"""Whether attention is swapped, and what will run."""

from __future__ import annotations

from pipeboost.contract.decision import Decision, Decisions, needs_tier
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, AttentionConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware
from pipeboost.features.attention.choice import check_name, explain_choice


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose the attention kernels.

    Raises:
        ConfigurationError: it contradicts the tier or another setting.
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.attention
    if asked is None:
        return Decision("attention", "off", "turned off; stock's processors run")
    if asked != "auto":
        check_name(asked.backend)
    if config.quality == "exact":
        if asked != "auto":
            raise needs_tier("attention", asked.backend, "lossless", config.quality)
        return Decision("attention", "off", "another kernel changes rounding, which tier 'exact' does not allow")
    settings = AttentionConfig() if asked == "auto" else asked
    choice, why, considered = explain_choice(settings, hardware=hardware, tier=config.quality, dtype=model.dtype)
    left = tuple(f"{name} stays stock: {reason}" for name, reason in model.stock_processors)
    if model.processors == 0:
        if settings.backend != "auto":
            raise UnsupportedError(
                f"attention={settings.backend!r} would not run in {model.pipeline}, whose processors call their kernel "
                "themselves; use attention=None"
            )
        return Decision("attention", "off", "its processors call their kernel themselves", left)
    padding = "padding of the text is cut" if family.padded_text else "padding of the text, if any, stays as in stock"
    return Decision("attention", choice, f"{why}; {padding}", (*considered, *left), settings)
