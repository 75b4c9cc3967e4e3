"""Chooses where each kind of component lives, and says why and what memory that will take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeboost.contract.model_info import ComponentSize
from pipeboost.core.config import OFFLOAD_KINDS, OffloadConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Activations
from pipeboost.features.offload.budget import NOTHING, cheapest, predict


def choose_policies(
    settings: OffloadConfig,
    components: Iterable[ComponentSize],
    activations: Activations | None,
    available: int,
    *,
    streams: bool = True,
) -> tuple[dict[str, str], str]:
    """Choose where each kind of component lives, and say why.

    Args:
        available: bytes on the device, where `settings.memory` does not say.
        streams: whether transformers may be streamed without being asked for.

    Raises:
        UnsupportedError: nothing that the settings allow fits.
    """
    components = tuple(components)
    general = None if settings.policy == "auto" else settings.policy
    fixed: dict[str, str | None] = {kind: getattr(settings, kind) or general for kind in OFFLOAD_KINDS}
    chosen = {kind: policy for kind, policy in fixed.items() if policy is not None}
    if len(chosen) == len(OFFLOAD_KINDS) and settings.memory is None:
        return chosen, "as asked"
    budget = available if settings.memory is None else round(settings.memory * 2**30)
    found = cheapest(components, fixed, activations, budget, streams=streams)
    if found is None and activations is None:
        # What is set aside for activations nobody measured must not refuse a pipeline that may well run.
        found = cheapest(components, fixed, NOTHING, budget, streams=streams)
    if found is None:
        least = {kind: policy or "layerwise" for kind, policy in fixed.items()}
        need = max(predict(components, least, activations or NOTHING).values())
        raise UnsupportedError(
            f"offload finds {in_gib(budget)} on the device, and the least that it can do with, "
            f"{', '.join(f'{kind}={policy!r}' for kind, policy in least.items())}, is {in_gib(need)} and a margin; use "
            "more memory, a smaller model or Diffusers' pipe.enable_sequential_cpu_offload()"
        )
    peak = max(predict(components, found, activations).values())
    return found, f"the cheapest that fits: {in_gib(peak)} at the peak, {in_gib(budget)} there"


def describe_memory(
    components: Iterable[ComponentSize], policies: Mapping[str, str], activations: Activations | None, *, weighed: str
) -> str:
    """Describe the predicted peak, its stage and size, and where each component lives."""
    components = tuple(components)
    peaks = predict(components, policies, activations or NOTHING)
    stage = max(peaks, key=lambda name: peaks[name])
    if activations is None:
        size = "plus activations, which were not measured for this device"
    else:
        frames = f", {activations.frames} frames" if activations.frames > 1 else ""
        size = f"in {stage} for {activations.width}×{activations.height}{frames}, batch 1 ({activations.source})"
    weights = sum(component.nbytes for component in components)
    where = ", ".join(f"{each.path} {in_gib(each.nbytes)} {policies[each.kind]}" for each in components if each.nbytes)
    return f"weights of {weighed} {in_gib(weights)} ({where}); predicted peak {in_gib(peaks[stage])} {size}"


def in_gib(nbytes: float) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
