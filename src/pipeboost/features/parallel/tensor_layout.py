"""Which weights of one model tensor parallelism splits, and into how many parts they can be split."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.obstacles import hook_of
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import SplitLayers, TensorSharding

Role = Literal["columns", "rows", "packed_rows", "gathered", "norms", "head_biases"]
_KINDS: dict[Role, tuple[type[nn.Module], ...]] = {
    "columns": (nn.Linear,),
    "rows": (nn.Linear,),
    "packed_rows": (nn.Linear,),
    "gathered": (nn.Linear, nn.Embedding),
    "norms": (nn.RMSNorm,),
    "head_biases": (nn.Embedding,),
}
"""The fields of `SplitLayers` that list layers → the classes that these may have."""
_ROWS = ("rows", "packed_rows")


@dataclass(frozen=True, eq=False)
class SplitLayer:
    """One layer that is split.

    Attributes:
        path: in the model.
        module: the layer.
        role: what it computes of the whole.
        dim: the dimension that is split: outputs are the first one of a linear's weight, the last of an embedding's.
        parts: what the split dimension consists of, such as one size, or the two of a packed row; each rank has its
            share of each part.
    """

    path: str
    module: nn.Module
    role: Role
    dim: int
    parts: tuple[int, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are split. A row's bias is whole on every rank."""
        named = self.module.named_parameters(recurse=False)
        return [parameter for name, parameter in named if name == "weight" or self.role not in _ROWS]


@dataclass(frozen=True, eq=False)
class Layout:
    """What is split of one model, or of one of its modules: all of that or nothing.

    Attributes:
        model: the name of its class.
        layers: each layer that is split.
        counts: module and attribute, for each that will count one rank's share of the heads, or of their width.
        sizes: what a degree must divide, and its name.
    """

    model: str
    layers: tuple[SplitLayer, ...]
    counts: tuple[tuple[nn.Module, str], ...]
    sizes: tuple[tuple[int, str], ...]

    @property
    def cuts(self) -> dict[nn.Parameter, tuple[int, tuple[int, ...]]]:
        """Each parameter that is split, the dimension, and the parts of that; one that is tied is here once."""
        return {parameter: (layer.dim, layer.parts) for layer in self.layers for parameter in layer.parameters}

    @property
    def degrees(self) -> tuple[int, ...]:
        """The degrees above 1 that fit."""
        common = math.gcd(*(size for size, _ in self.sizes))
        return tuple(degree for degree in range(2, common + 1) if common % degree == 0)

    @property
    def bytes(self) -> int:
        """Size of all parameters that are split, as they are now."""
        return sum(parameter.nbytes for parameter in self.cuts)

    def check(self, degree: int) -> None:
        """Refuse a degree that does not fit.

        Raises:
            ConfigurationError: it does not divide the heads or a width.
        """
        for size, name in self.sizes:
            if size % degree:
                fitting = ", ".join(map(str, (*self.degrees, 1)))
                raise ConfigurationError(
                    f"tensor={degree} does not divide the {size} {name} of {self.model}; use {fitting}"
                )


def layout_of(model: nn.Module, sharding: TensorSharding) -> Layout:
    """Return what of `model` is split, as its family or encoder declares it. Changes nothing.

    An attention whose processor has weights of its own, as an IP-Adapter's has, stays whole, because nothing tells how
    such a processor uses the heads. So does a layer whose weight is tied to a layer that is not split.

    Raises:
        UnsupportedError: the model has none of these layers, or one is quantised, offloaded, fused or has a LoRA.
    """
    name = stock_class(model).__name__
    units = []
    for members in sharding.layers:
        pattern = re.compile(members.path.replace(".", r"\.").replace("*", r"\w+"))
        by_heads = members.counts or members.head_width
        for path, module in model.named_modules():
            processors = (getattr(child, "processor", None) for child in module.modules())
            if pattern.fullmatch(path) and not (by_heads and any(map(has_weights, processors))):
                units.append(_unit(path, module, members, name))
    units = _without_tied(model, [unit for unit in units if unit.layers])
    layers = {layer.module: layer for unit in units for layer in unit.layers}
    if not layers:
        raise UnsupportedError(
            f"{name} has none of the layers that tensor parallelism knows how to split; use tensor=1"
        )
    widths = [(size, f"features of {layer.path}") for layer in layers.values() for size in layer.parts]
    return Layout(
        model=name,
        layers=tuple(layers.values()),
        counts=tuple(count for unit in units for count in unit.counts),
        sizes=(*(heads for unit in units for heads in unit.sizes), *widths),
    )


def has_weights(processor: Any) -> bool:
    """Whether an attention processor has weights of its own."""
    return isinstance(processor, nn.Module) and next(processor.parameters(), None) is not None


def _unit(path: str, module: nn.Module, members: SplitLayers, model: str) -> Layout:
    found: list[SplitLayer] = []
    for role in _KINDS:
        for name in getattr(members, role):
            layer = _descendant(module, name)
            if layer is None:
                continue
            where = f"{path}.{name}".lstrip(".")
            layer = _plain(layer, role, where, model)
            dim = int(role in _ROWS or isinstance(layer, nn.Embedding))
            whole = layer.weight.shape[dim]  # type: ignore[index]
            packed = filter(None, (_descendant(module, column) for column in members.packed_rows.get(name, ())))
            sizes = tuple(_base(part).weight.shape[0] for part in packed) or (whole,)
            assert sum(sizes) == whole, f"{where} takes {whole} features, not {sizes}"
            found.append(SplitLayer(where, layer, role, dim, sizes))
    counts = tuple(_count(module, attribute) for attribute in members.counts)
    if members.head_width:
        width = int(getattr(module, members.head_width))
        columns = [layer for layer in found if layer.role == "columns"]
        heads = [(layer.parts[0] // width, f"heads of {layer.path}") for layer in columns]
    else:
        heads = [(getattr(*each), f"{each[1]} of {path}" if number else "heads") for number, each in enumerate(counts)]
    return Layout(model, tuple(found), counts, tuple(heads))


def _plain(layer: nn.Module, role: Role, path: str, model: str) -> nn.Module:
    """Return the layer if its weights can be split."""
    if hasattr(layer, "base_layer") and not getattr(layer, "merged", False):
        raise UnsupportedError(
            f"{path} of {model} has a LoRA, which tensor parallelism cannot split; "
            "call pipe.fuse_lora() and pipe.unload_lora_weights() first, or use tensor=1"
        )
    layer = _base(layer)
    if hook_of(vars(layer)) is not None:
        raise UnsupportedError(
            f"{path} of {model} is offloaded, and tensor parallelism splits weights where they stay; "
            "turn the offload off (pipe.remove_all_hooks()), or use tensor=1"
        )
    parameters = tuple(layer.parameters(recurse=False))
    if stock_class(layer) not in _KINDS[role] or not all(map(_is_plain, parameters)):
        kinds = sorted({f"{type(each.data).__name__} {each.dtype}" for each in parameters})
        raise UnsupportedError(
            f"{path} of {model} is a {stock_class(layer).__name__} with weights of "
            f"{' and '.join(kinds) or 'no parameters'}, which tensor parallelism cannot split; load the model without "
            "quantisation, or use tensor=1"
        )
    assert type(layer) is stock_class(layer), f"{path} is ours already"
    return layer


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _is_plain(parameter: nn.Parameter) -> bool:
    wide_enough = parameter.is_floating_point() and parameter.element_size() > 1
    return type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor and wide_enough


def _count(module: nn.Module, attribute: str) -> tuple[nn.Module, str]:
    path, _, name = attribute.rpartition(".")
    owner = module.get_submodule(path)
    if getattr(owner, "fused_projections", False):
        raise UnsupportedError(
            f"{stock_class(owner).__name__} has fused projections, which tensor parallelism cannot split; "
            "call its model's unfuse_qkv_projections() first, or use tensor=1"
        )
    return owner, name


def _without_tied(model: nn.Module, units: list[Layout]) -> list[Layout]:
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    split: set[tuple[nn.Module, int]] | None = None
    while split != (left := {(layer.module, layer.dim) for unit in units for layer in unit.layers}):
        split = left
        units = [
            unit
            for unit in units
            if all(
                (owner, layer.dim) in split
                for layer in unit.layers
                for each in layer.parameters
                for owner in owners[each]
            )
        ]
    return units


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:  # a variant of the model does not have it
        return None
