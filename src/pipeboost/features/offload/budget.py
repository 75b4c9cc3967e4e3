"""What a placement will need, predicted before anything runs, and the cheapest one that fits.

The peak is the resident weights plus, for the hungriest stage, the weights that wait on the host outside that stage and
the stage's activations. The cost is the bytes that a call sends to the device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pipeboost.contract.model_info import ComponentSize
from pipeboost.core.config import OFFLOAD_KINDS, OFFLOAD_POLICIES, OffloadConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Activations, Family, Linear
from pipeboost.features.offload.stream import BLOCKS_ON_DEVICE, tensors_of

STAGES = {"text_encoders": "text encoding", "transformers": "denoising", "vae": "decoding"}
"""The stage in which each kind of component works."""

UNMEASURED = 4 * 2**30
"""Bytes set aside for the activations of a family that was not measured."""

# What the allocator loses between blocks of different sizes, and small tensors that live throughout.
_MARGIN = 0.02
# Forwards of a call, as far as they can be known before it: enough to rank streaming behind loading once.
_FORWARDS = {"text_encoders": 1, "transformers": 25, "vae": 1}
_SHORTEST_LIST = 4


def kind_of(path: str, family: Family) -> tuple[str, str | None]:
    """Return the kind of a component and which part of its stage it is, from the name that Diffusers gives it."""
    if path in family.denoisers:
        return "transformers", path
    if "encoder" in path:
        return "text_encoders", None
    if "vae" in path:
        return "vae", None
    return "transformers", None  # a ControlNet and its like, called with the denoiser in every step


def weigh(modules: Mapping[str, nn.Module], family: Family) -> tuple[ComponentSize, ...]:
    """Weigh components, loaded or on the meta device; what two share counts once."""
    seen: set[int] = set()
    found = []
    for path, module in modules.items():
        new = [tensor for tensor in tensors_of(module) if id(tensor) not in seen]
        seen.update(map(id, new))
        blocks = [sum(tensor.nbytes for tensor in tensors_of(block)) for block in repeated_blocks(path, module, family)]
        total = sum(tensor.nbytes for tensor in new)
        found.append(
            ComponentSize(path, *kind_of(path, family), total, min(sum(blocks), total), max(blocks, default=0))
        )
    return tuple(found)


def repeated_blocks(path: str, module: nn.Module, family: Family) -> list[nn.Module]:
    """Return the blocks that can be streamed: those the family names, else the members of longer lists of modules."""
    if path in family.denoisers and family.blocks:
        found = [blocks for each in family.blocks if (blocks := _at(module, each.path)) is not None]
    else:
        found = list(_lists(module))
    return list({id(block): block for blocks in found for block in blocks}.values())


def on_device(component: ComponentSize, policy: str) -> int:
    """Return the bytes that a component has on the device while it works."""
    if policy == "layerwise" and component.block_bytes:
        return component.nbytes - component.block_bytes + BLOCKS_ON_DEVICE * component.largest_block
    return component.nbytes


def _moved(component: ComponentSize, policy: str) -> int:
    """Return the bytes that a call sends to the device."""
    if policy == "resident":
        return 0
    if policy == "stage":
        return component.nbytes
    return component.nbytes + component.block_bytes * (_FORWARDS[component.kind] - 1)


def predict(
    components: Iterable[ComponentSize], policies: Mapping[str, str], activations: Activations | None
) -> dict[str, int]:
    """Return the peak bytes on the device in each stage, at the size that the activations are given for.

    Args:
        policies: kind → policy.
        activations: of the family; None sets aside `UNMEASURED` where images are made.
    """
    components, needs = tuple(components), activations or _assumed(UNMEASURED)
    size = needs.width, needs.height, needs.frames
    needed = needs.text_encoding, needs.denoising.at(*size), needs.decoding.at(*size)
    resident = sum(component.nbytes for component in components if policies[component.kind] == "resident")
    peaks = {}
    for (kind, stage), working in zip(STAGES.items(), needed, strict=True):
        staged = [each for each in components if each.kind == kind and policies[kind] != "resident"]
        together = sum(on_device(each, policies[kind]) for each in staged if each.part is None)
        parts = [on_device(each, policies[kind]) for each in staged if each.part is not None]
        peaks[stage] = resident + together + max(parts, default=0) + working
    return peaks


def _assumed(nbytes: int) -> Activations:
    return Activations(Linear(nbytes, 0), Linear(nbytes, 0), 0, width=0, height=0, frames=0, source="assumed")


NOTHING = _assumed(0)
"""No activations at all."""


def cheapest(
    components: Iterable[ComponentSize],
    fixed: Mapping[str, str | None],
    activations: Activations | None,
    budget: int,
    *,
    streams: bool = True,
) -> dict[str, str] | None:
    """Return the policies that send the fewest bytes among those whose predicted peak fits; None where none fits.

    Args:
        fixed: kind → its policy, None where it is free.
        budget: bytes on the device for the pipeline, weights and all.
        streams: whether transformers may be streamed without being asked for.
    """
    components, options = tuple(components), []
    for kind in OFFLOAD_KINDS:
        free = OFFLOAD_POLICIES if streams or kind != "transformers" else ("resident", "stage")
        options.append(free if (policy := fixed[kind]) is None else (policy,))

    def cost(policies: dict[str, str]) -> tuple[int, int, int]:
        chosen = list(policies.values())
        moved = sum(_moved(component, policies[component.kind]) for component in components)
        return moved, chosen.count("layerwise"), chosen.count("stage")

    possible = (dict(zip(OFFLOAD_KINDS, chosen, strict=True)) for chosen in itertools.product(*options))
    limit = budget * (1 - _MARGIN)
    fitting = [each for each in possible if max(predict(components, each, activations).values()) <= limit]
    return min(fitting, key=cost, default=None)


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


def bytes_on(device: torch.device, modules: Iterable[nn.Module]) -> int:
    """Return the bytes of the weights that are on a device now."""
    unique = {id(tensor): tensor for module in modules for tensor in tensors_of(module) if tensor.device == device}
    return sum(tensor.nbytes for tensor in unique.values())


def _at(module: Any, path: str) -> Any:
    return functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), module)


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) >= _SHORTEST_LIST:
            yield child
        else:
            yield from _lists(child)
