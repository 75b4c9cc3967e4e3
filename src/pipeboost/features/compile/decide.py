"""What is compiled."""

from __future__ import annotations

from dataclasses import replace

from pipeboost.contract.decision import Decision, Decisions, needs_tier
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, CompileConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose what torch.compile captures.

    Raises:
        ConfigurationError: it contradicts the tier or another setting.
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.compile
    if asked is None:
        return Decision("compile", "off", "turned off")
    if asked != "auto" and asked.scope is None:
        return Decision("compile", "off", "turned off; CUDA graphs alone")
    if config.quality == "exact":
        if asked != "auto":
            raise needs_tier("compile", asked.scope, "lossless", config.quality)
        return Decision("compile", "off", "compiling changes rounding, which tier 'exact' does not allow")
    if asked == "auto" and hardware.device == "cpu":
        return Decision(
            "compile", "off", "on a CPU building takes longer than one image saves; compile='regional' turns it on"
        )
    settings = CompileConfig() if asked == "auto" else asked
    if settings.backend == "inductor" and not hardware.compiler:
        needs = "a C++ compiler such as g++" if hardware.device == "cpu" else "the package triton"
        if asked != "auto":
            raise UnsupportedError(f"compile={settings.scope!r} needs {needs}, which is missing here; use compile=None")
        return Decision("compile", "off", f"it needs {needs}, which is missing here")
    if model.hooks is not None and asked != "auto":
        raise UnsupportedError(
            f"compile={settings.scope!r} cannot capture blocks of {model.model}, which have {model.hooks}; use "
            "compile=None, or take the hooks off"
        )
    obstacle = model.hooks or model.odd_blocks
    if obstacle is not None and asked == "auto":
        return Decision("compile", "off", f"the blocks may not be captured: they have {obstacle}")
    considered = () if settings.scope == "full" else ("full: 1-2% faster on FLUX for 4x the cold start",)
    if settings.dynamic:
        sizes = "for all sizes"
    elif any(blocks.text_dims for blocks in family.blocks):
        sizes = "reused by all; the text length is dynamic, the image size is not"
    elif family.blocks:
        sizes = "reused by all; another image size is another graph"
    else:
        sizes = "reused by all; a size that changes costs one more, which then fits any"
    why = f"one graph {'of the whole model' if settings.scope == 'full' else 'per kind of block'}, {sizes}"
    # What is compiled does not depend on how it is launched, so pipelines that differ in that alone can share it.
    return Decision("compile", str(settings.scope), why, considered, replace(settings, graphs=False))
