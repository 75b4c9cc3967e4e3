"""Whether linears run in 8 bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from pipeboost.contract.decision import Decision, Decisions, needs_tier
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, QuantizeConfig, tier_allows
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware

CAPABILITY = (8, 9)
"""The first GPUs with tensor cores for 8-bit floating point."""


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose whether the linears of the transformers' blocks get 8 bits.

    Raises:
        ConfigurationError: the tier does not allow what was asked for.
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.quantize
    if asked is None:
        return Decision("quantize", "off", "turned off")
    if not tier_allows(config.quality, "balanced"):
        if asked != "auto":
            raise needs_tier("quantize", asked.scheme, "balanced", config.quality)
        return Decision("quantize", "off", f"8 bits are less than tier {config.quality!r} allows; 'balanced' has them")
    obstacle = _obstacle(model, hardware, earlier)
    if obstacle is not None:
        if asked != "auto":
            raise UnsupportedError(f"quantize={asked.scheme!r} is not possible here: {obstacle}; use quantize=None")
        return Decision("quantize", "off", obstacle)
    if asked == "auto" and hardware.device == "cpu":
        return Decision("quantize", "off", "a CPU computes no faster in 8 bits; quantize='fp8' turns it on")
    if asked == "auto" and not family.blocks:
        why = (
            f"nobody has said which linears of {model.model} bear 8 bits; quantize='fp8' puts all of its blocks in them"
        )
        return Decision("quantize", "off", why)
    settings = QuantizeConfig() if asked == "auto" else asked
    if model.quantizable is None:
        return Decision(
            "quantize", settings.scheme, "linears of the blocks, with a scale for each row", settings=settings
        )
    found = model.quantizable.values()
    host = sum(each.nbytes for each in found)
    size = f"{host / 2**30:.2f} GiB" if host >= 2**30 / 10 else f"{host / 2**20:.1f} MiB"
    kept = f"the weights as they were take {size} of the host's memory, for remove() and for what reads them"
    if not settings.reversible:
        kept = "no weights are kept as they were, so remove() does not bring them back"
    why = f"{sum(each.count for each in found)} linears of the blocks, with a scale for each row; {kept}"
    left: Counter[str] = Counter()
    for each in found:
        left.update(each.left)
    considered = tuple(f"{count} linears {reason}: keep their precision" for reason, count in left.items())
    return Decision("quantize", settings.scheme, why, considered, settings, _smaller(model))


def _obstacle(model: ModelInfo, hardware: Hardware, earlier: Decisions) -> str | None:
    layout = earlier["parallel"].settings
    capability = hardware.capability
    if capability is not None and capability < CAPABILITY:
        there, needed = (".".join(map(str, each)) for each in (capability, CAPABILITY))
        return f"8-bit floating point needs compute capability {needed}, and {hardware.name} has {there}"
    if model.quantizable is not None and any(each.already for each in model.quantizable.values()):
        return f"{model.model} was quantised as it was loaded, and is left as it is"
    if hardware.device == "cuda" and model.dtype not in (torch.bfloat16, torch.float16):
        return f"{model.model} is in {str(model.dtype).removeprefix('torch.')}, and 8 bits pay beside 16 alone"
    if model.offloaded or model.hooks is not None:
        return f"the weights of {model.model} are moved by {model.hooks or 'the offload of Diffusers'}"
    if layout is not None and layout.tensor > 1:
        return f"tensor={layout.tensor} splits the linears, whose shares have no 8-bit form in this version"
    found = model.quantizable
    if found is not None and not any(each.count for each in found.values()):
        reasons = " or ".join(sorted({reason for each in found.values() for reason in each.left}))
        return f"{model.model} has no linears in blocks{f' but some {reasons}' if reasons else ''}"
    return None


def _smaller(model: ModelInfo) -> ModelInfo:
    """Return the model with its weights in 8 bits."""
    found = model.quantizable or {}
    components = tuple(
        each.resized(each.nbytes - found[each.path].nbytes + found[each.path].quantised) if each.path in found else each
        for each in model.components
    )
    saved = sum(before.nbytes - after.nbytes for before, after in zip(model.components, components, strict=True))
    return replace(model, components=components, weights=model.weights - saved)
