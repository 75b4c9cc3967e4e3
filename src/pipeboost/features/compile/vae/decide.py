"""What is done to the VAE."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeboost.contract.decision import Decision, Decisions, needs_tier
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, CompileConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware
from pipeboost.features.compile.vae.known_sizes import known_sizes


@dataclass(frozen=True)
class VaeSettings:
    """What is done to a VAE.

    Attributes:
        rewrites: whether its convolutions and norms are rewritten.
        compiled: how its encoder and decoder are compiled; None where they are not.
        sizes: those that are compiled, as `name_of` gives them; None for all.
    """

    rewrites: bool = False
    compiled: CompileConfig | None = None
    sizes: frozenset[str] | None = None


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose how the VAE computes.

    Raises:
        ConfigurationError: it contradicts the tier.
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.compile
    wanted = False if asked is None else "auto" if asked == "auto" else asked.vae
    if config.quality == "exact":
        if wanted is True:
            raise needs_tier("compile.vae", True, "lossless", config.quality)
        return Decision("vae", "off", "only rounding would change, but tier 'exact' does not allow that")
    if wanted is False:
        return Decision("vae", "off", "turned off")
    if model.vae is None:
        return _refusal(wanted, "the pipeline has no VAE")
    settings = CompileConfig() if asked == "auto" or asked is None else asked
    if wanted == "auto" and (settings.scope is None or (asked == "auto" and hardware.device == "cpu")):
        where = "on a CPU" if hardware.device == "cpu" else "with CUDA graphs alone"
        return Decision("vae", "off", f"left as it is {where}; CompileConfig(vae=True) turns it on")
    if model.vae == "compiled":
        return Decision("vae", "off", "left as it is: it was compiled before")
    if model.vae == "causal":
        why = "convolutions over one frame in two dimensions, over several without copies; norms in one pass"
        return Decision("vae", "rewritten", why, settings=VaeSettings(rewrites=True))
    obstacle = _obstacle(config, settings, model, hardware, earlier)
    if obstacle is not None:
        return _refusal(wanted, obstacle)
    compiled = replace(settings, scope="full", graphs=False, vae=True)
    if wanted == "auto":
        # Ranks decide alike, whatever each finds on its disk.
        alone = settings.backend == "inductor" and not earlier["parallel"].on
        sizes = known_sizes(model.vae_key, hardware.name) if alone else frozenset()
        if not sizes:
            return Decision("vae", "off", _price(family))
        why = f"for sizes whose code is at hand from before, {len(sizes)} so far"
        return Decision("vae", "compiled", why, settings=VaeSettings(compiled=compiled, sizes=sizes))
    return Decision("vae", "compiled", "at its first use, one graph a size", settings=VaeSettings(compiled=compiled))


def _refusal(wanted: bool | str, reason: str) -> Decision:
    if wanted is True:
        raise UnsupportedError(f"compile.vae=True is not possible here: {reason}; use vae='auto' or False")
    return Decision("vae", "off", f"left as it is: {reason}")


def _obstacle(
    config: AccelerationConfig, settings: CompileConfig, model: ModelInfo, hardware: Hardware, earlier: Decisions
) -> str | None:
    parallel, offload = earlier["parallel"].settings, earlier["offload"].settings
    against = {
        "the ranks share its work": parallel is not None and parallel.shares_vae(config.quality),
        "its weights come block by block": offload is not None and offload.vae == "layerwise",
        "Diffusers' own offload moves its weights": model.offloaded,
        "the compiler's needs are missing here": settings.backend == "inductor" and not hardware.compiler,
    }
    return next((reason for reason, holds in against.items() if holds), None)


def _price(family: Family) -> str:
    measured = None if family.autoencoder is None else family.autoencoder.compiling
    if measured is None:
        return (
            "compiling it takes seconds; CompileConfig(vae=True) does so at its first use, `pipeboost warm` beforehand"
        )
    return (
        f"compiling its decoder takes {measured.seconds:.0f} s and saves {measured.saved * 1000:.0f} ms a picture "
        f"({measured.workload}, {measured.hardware}), so it pays after {measured.pays_after} of one size; "
        "CompileConfig(vae=True) does so at its first use, `pipeboost warm` beforehand"
    )
