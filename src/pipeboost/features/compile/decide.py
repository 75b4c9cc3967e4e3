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
    considered = () if settings.scope == "full" else ("full: 1-2% faster on FLUX for 4x the cold start",)
    why = "one graph per kind of block, reused by all; the text length is dynamic, the image size is not"
    if settings.dynamic:
        why = "one graph per kind of block for all sizes"
    # What is compiled does not depend on how it is launched, so pipelines that differ in that alone can share it.
    return Decision("compile", str(settings.scope), why, considered, replace(settings, graphs=False))
