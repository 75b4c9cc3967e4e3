"""What a placement will need, told before anything runs, and the cheapest one that fits.

The peak is the resident weights plus, for the hungriest stage, the weights that wait on the host outside that stage and
the stage's activations. The cost is the bytes that a call sends to the device.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from pipeboost.contract.model_info import ComponentSize
from pipeboost.core.config import OFFLOAD_KINDS
from pipeboost.core.families import Activations, Family
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
    return "transformers", None  # a ControlNet and its like, called beside the denoiser in every step


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
        found = [operator.attrgetter(blocks.path)(module) for blocks in family.blocks if _has(module, blocks.path)]
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
    components: Iterable[ComponentSize],
    policies: Mapping[str, str],
    activations: Activations | None,
    *,
    unmeasured: int = UNMEASURED,
) -> dict[str, int]:
    """Return the peak bytes on the device in each stage, at the size that the activations are given for.

    Args:
        policies: kind → policy.
        activations: of the family.
        unmeasured: bytes to set aside, where images are made, for a family whose activations were not measured.
    """
    components = tuple(components)
    resident = sum(component.nbytes for component in components if policies[component.kind] == "resident")
    peaks = {}
    for kind, stage in STAGES.items():
        staged = [each for each in components if each.kind == kind and policies[kind] != "resident"]
        beside = sum(on_device(each, policies[kind]) for each in staged if each.part is None)
        parts = [on_device(each, policies[kind]) for each in staged if each.part is not None]
        peaks[stage] = resident + beside + max(parts, default=0) + _needed(stage, activations, unmeasured)
    return peaks


def cheapest(
    components: Iterable[ComponentSize],
    fixed: Mapping[str, str | None],
    activations: Activations | None,
    budget: int,
    *,
    streams: bool = True,
    unmeasured: int = UNMEASURED,
) -> dict[str, str] | None:
    """Return the policies that send the fewest bytes among those whose predicted peak fits; None where none fits.

    Args:
        fixed: kind → its policy, None where it is free.
        budget: bytes on the device for the pipeline, weights and all.
        streams: whether transformers may be streamed without being asked for.
        unmeasured: see `predict`.
    """
    components = tuple(components)
    free = ("resident", "stage", "layerwise")
    best: tuple[tuple[int, ...], dict[str, str]] | None = None
    for chosen in itertools.product(*((fixed[kind] or "",) if fixed[kind] else free for kind in OFFLOAD_KINDS)):
        policies = dict(zip(OFFLOAD_KINDS, chosen, strict=True))
        if not streams and policies["transformers"] == "layerwise" and not fixed["transformers"]:
            continue
        peak = max(predict(components, policies, activations, unmeasured=unmeasured).values())
        if peak > budget * (1 - _MARGIN):
            continue
        moved = sum(_moved(component, policies[component.kind]) for component in components)
        cost = (moved, chosen.count("layerwise"), chosen.count("stage"))
        if best is None or cost < best[0]:
            best = cost, policies
    return None if best is None else best[1]


def bytes_on(device: torch.device, modules: Iterable[nn.Module]) -> int:
    """Return the bytes of the weights that are on a device now."""
    unique = {id(tensor): tensor for module in modules for tensor in tensors_of(module) if tensor.device == device}
    return sum(tensor.nbytes for tensor in unique.values())


def _needed(stage: str, activations: Activations | None, unmeasured: int) -> int:
    if activations is None:
        return 0 if stage == STAGES["text_encoders"] else unmeasured
    size = activations.width, activations.height, activations.frames
    if stage == STAGES["transformers"]:
        return activations.denoising.at(*size)
    if stage == STAGES["vae"]:
        return activations.decoding.at(*size)
    return activations.text_encoding


def _has(module: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) >= _SHORTEST_LIST:
            yield child
        else:
            yield from _lists(child)
