"""Which linears of a transformer get 8 bits: those of its repeated blocks, but for what family or width forbid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from pipeboost.contract.model_info import ComponentSize, Quantizable
from pipeboost.core.blocks import repeated_blocks
from pipeboost.core.families import Family
from pipeboost.core.obstacles import hook_of
from pipeboost.features.quantize.linear import MULTIPLE, Float8Linear

_BYTES_OF_SCALE = 4


class Place(NamedTuple):
    """Where a linear is: its name in the module that has it, and its path from the model without that of wrappers."""

    parent: nn.Module
    name: str
    path: str


def linears_of(model: nn.Module, family: Family) -> tuple[list[tuple[Place, nn.Linear]], Mapping[str, int]]:
    """Return the linears of a transformer that can have 8 bits, block by block, and of the others reason → how many.

    Of one that has 8 bits now it is the original that counts.
    """
    found: list[tuple[Place, nn.Linear]] = []
    seen: set[int] = set()
    left: Counter[str] = Counter()
    tied, dtype = _tied(model), getattr(model, "dtype", None)  # which walks through the whole model
    for block_path, block in _blocks(model, family).items():
        for place, module, obstacle in _in(block, block_path):
            linear = module.original if isinstance(module, Float8Linear) else module
            if linear is None or id(linear) in seen:
                continue
            seen.add(id(linear))
            obstacle = obstacle or _obstacle(linear, dtype, tied)
            if any(fnmatchcase(place.path, pattern) for pattern in family.keep_precision):
                obstacle = "kept as they are by the family"
            if obstacle is None:
                found.append((place, linear))
            else:
                left[obstacle] += 1
    return found, left


def quantizable(models: Mapping[str, nn.Module], family: Family) -> dict[str, Quantizable]:
    """Return what can have 8 bits of each transformer, by component; loaded or on the meta device."""
    result = {}
    for path, model in models.items():
        linears, left = linears_of(model, family)
        found = [linear for _, linear in linears]
        # Of these a removal makes plain ones again.
        not_kept = [each for each in _quantised_in(model) if each.original is None]
        result[path] = Quantizable(
            count=len(found) + len(not_kept),
            nbytes=sum(linear.weight.nbytes for linear in found) + sum(map(_bytes_before, not_kept)),
            quantised=sum(map(_quantised_bytes, found)) + sum(map(_quantised_bytes, not_kept)),
            left=left,
            already=_already(model),
        )
    return result


def of_original(component: ComponentSize, module: nn.Module) -> ComponentSize:
    """Return a component as it is once an acceleration that has quantised it is undone."""
    more = sum(_bytes_before(each) - _quantised_bytes(each) for each in _quantised_in(module))
    return component.resized(component.nbytes + more)


def _blocks(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    if not family.blocks:
        return repeated_blocks(model)
    paths = [blocks.path for blocks in family.blocks]
    lists = {path: module for path, module in model.named_modules() if path in paths}
    return {f"{path}.{name}": block for path, blocks in lists.items() for name, block in blocks.named_children()}


def _in(module: nn.Module, path: str) -> Iterator[tuple[Place, nn.Linear | Float8Linear, str | None]]:
    """Yield each linear in a module, and what in its surroundings is against 8 bits."""
    for name, child in module.named_children():
        inner = f"{path}.{name}"
        if type(child) is nn.Linear or isinstance(child, Float8Linear):
            yield Place(module, name, inner), child, None
        elif isinstance(base := child._modules.get("base_layer"), nn.Module):
            if type(base) is nn.Linear or isinstance(base, Float8Linear):
                yield Place(child, "base_layer", inner), base, _obstacle_of_adapter(child)
        elif name != "processor":  # whose weights are an adapter's
            yield from _in(child, inner)


def _obstacle_of_adapter(adapter: nn.Module) -> str | None:
    members = vars(adapter)
    calls_base_alone = "lora_A" in members["_modules"] and not members.get("lora_variant")
    # One that is merged and turned off takes itself out of the weight in its next forward.
    if not calls_base_alone or (members.get("merged_adapters") and members.get("_disable_adapters")):
        return "of an adapter that reads their weights"
    return None


def _obstacle(linear: nn.Linear, dtype: torch.dtype | None, tied: set[int]) -> str | None:
    weight, members = linear._parameters.get("weight"), vars(linear)
    if weight is None or type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return "with weights of another kind"
    if weight.dtype != dtype:
        return f"in {str(weight.dtype).removeprefix('torch.')}"
    if any(width % MULTIPLE for width in weight.shape):
        return f"with a width that is no multiple of {MULTIPLE}"
    if id(weight) in tied:
        return "that share their weight"
    if "forward" in members or hook_of(members) is not None:
        return "that were changed by a hook"
    return None


def _tied(model: nn.Module) -> set[int]:
    # A linear that two modules hold counts twice: only one of them would get another in its place.
    modules = (module for _, module in model.named_modules(remove_duplicate=False))
    counts = Counter(id(each) for module in modules for each in module._parameters.values())
    return {key for key, count in counts.items() if count > 1}


def _already(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None))


def _quantised_in(module: nn.Module) -> list[Float8Linear]:
    return [each for each in module.modules() if isinstance(each, Float8Linear)]


def _bytes_before(quantised: Float8Linear) -> int:
    return quantised.weight.numel() * quantised.dtype.itemsize


def _quantised_bytes(linear: nn.Linear | Float8Linear) -> int:
    return linear.weight.numel() + _BYTES_OF_SCALE * linear.out_features
