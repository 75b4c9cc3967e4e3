"""Which weights of one model tensor parallelism splits, and into how many parts they can be split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import SplitLayers, TensorSharding

Role = Literal["column", "row", "gathered", "norm", "head_bias"]
_KINDS: dict[Role, tuple[type[nn.Module], ...]] = {
    "column": (nn.Linear,),
    "row": (nn.Linear,),
    "gathered": (nn.Linear, nn.Embedding),
    "norm": (nn.RMSNorm,),
    "head_bias": (nn.Embedding,),
}
_HOOKS = ("_hf_hook", "_diffusers_hook")


@dataclass(frozen=True, eq=False)
class SplitLayer:
    """One layer that is split.

    Attributes:
        path: in the model.
        module: the layer.
        role: what it computes of the whole.
        parts: what the split dimension consists of, such as one size, or the two of a packed row; each rank has its
            share of each part.
    """

    path: str
    module: nn.Module
    role: Role
    parts: tuple[int, ...]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """The parameters that are split: name, parameter, dimension. A row's bias is whole on every rank."""
        dim = _split_dim(self.role, self.module)
        for name, parameter in self.module.named_parameters(recurse=False):
            if self.role != "row" or name == "weight":
                yield name, parameter, dim


@dataclass(frozen=True, eq=False)
class Count:
    """An attribute of a module that counts heads or the width of all heads."""

    module: nn.Module
    name: str

    @property
    def value(self) -> int:
        """What it says now."""
        return int(getattr(self.module, self.name))


@dataclass(frozen=True)
class Layout:
    """What is split of one model.

    Attributes:
        model: the name of its class.
        layers: each layer that is split.
        counts: each attribute that will count one rank's share.
        left: path and reason, for what could be split and stays whole.
        sizes: what a degree must divide, and its name.
    """

    model: str
    layers: tuple[SplitLayer, ...]
    counts: tuple[Count, ...]
    left: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[int, str], ...]

    @property
    def degrees(self) -> tuple[int, ...]:
        """The degrees above 1 that fit."""
        common = math.gcd(*(size for size, _ in self.sizes))
        return tuple(degree for degree in range(2, common + 1) if common % degree == 0)

    @property
    def bytes(self) -> int:
        """Size of all parameters that are split, as they are now."""
        split = {parameter for layer in self.layers for _, parameter, _ in layer.parameters()}
        return sum(parameter.numel() * parameter.element_size() for parameter in split)

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


@dataclass(frozen=True, eq=False)
class _Unit:
    """Layers that are split together or not at all."""

    path: str
    layers: tuple[SplitLayer, ...]
    counts: tuple[Count, ...]
    heads: tuple[tuple[int, str], ...]


def layout_of(model: nn.Module, sharding: TensorSharding) -> Layout:
    """What of `model` is split, as its family or encoder declares it. Changes nothing.

    An attention whose processor has weights of its own, as an IP-Adapter's has, stays whole, because nothing tells how
    such a processor uses the heads. So does a layer whose weight is tied to a layer that is not split.

    Raises:
        UnsupportedError: the model has none of these layers, or one is quantised, offloaded, fused or has a LoRA.
    """
    name = stock_class(model).__name__
    left: dict[str, str] = {}
    units = []
    for members in sharding.layers:
        for path, module in _matching(model, members.path):
            reason = _why_whole(module, members)
            if reason is not None:
                left[path] = reason
                continue
            unit = _unit(path, module, members, name)
            if unit.layers:
                units.append(unit)
    units, tied = _without_tied(model, units)
    left |= dict.fromkeys(tied, "its weight is tied to that of a layer that is not split")
    if not units:
        raise UnsupportedError(
            f"{name} has none of the layers that tensor parallelism knows how to split; use tensor=1"
        )
    layers = {layer.module: layer for unit in units for layer in unit.layers}
    widths = [(size, f"features of {layer.path}") for layer in layers.values() for size in layer.parts]
    return Layout(
        model=name,
        layers=tuple(layers.values()),
        counts=tuple(count for unit in units for count in unit.counts),
        left=tuple(left.items()),
        sizes=(*(heads for unit in units for heads in unit.heads), *widths),
    )


def _unit(path: str, module: nn.Module, members: SplitLayers, model: str) -> _Unit:
    found: list[SplitLayer] = []
    roles: tuple[tuple[Role, tuple[str, ...]], ...] = (
        ("column", members.columns),
        ("row", members.rows),
        ("row", tuple(members.packed_rows)),
        ("gathered", members.gathered),
        ("norm", members.norms),
        ("head_bias", members.head_biases),
    )
    for role, names in roles:
        for name in names:
            layer = _descendant(module, name)
            if layer is None:
                continue
            where = f"{path}.{name}".lstrip(".")
            layer = _plain(layer, role, where, model)
            whole = layer.weight.shape[_split_dim(role, layer)]  # type: ignore[index]
            parts = [_descendant(module, column) for column in members.packed_rows.get(name, ())]
            sizes = tuple(_base(part).weight.shape[0] for part in parts if part is not None) or (whole,)
            assert sum(sizes) == whole, f"{where} takes {whole} features, not {sizes}"
            found.append(SplitLayer(where, layer, role, sizes))
    counts = tuple(_count(module, attribute) for attribute in members.counts)
    return _Unit(path, tuple(found), counts, _heads(path, module, members, found, counts))


def _heads(
    path: str, module: nn.Module, members: SplitLayers, layers: list[SplitLayer], counts: tuple[Count, ...]
) -> tuple[tuple[int, str], ...]:
    if members.head_width:
        width = int(getattr(module, members.head_width))
        return tuple((layer.parts[0] // width, f"heads of {layer.path}") for layer in layers if layer.role == "column")
    names = ("heads", *(f"{count.name} of {path}" for count in counts[1:]))
    return tuple((count.value, name) for count, name in zip(counts, names, strict=False))


def _why_whole(module: nn.Module, members: SplitLayers) -> str | None:
    if not members.counts and not members.head_width:
        return None
    processors = [getattr(child, "processor", None) for child in module.modules()]
    with_weights = [isinstance(each, nn.Module) and next(each.parameters(), None) is not None for each in processors]
    return "its processor has weights of its own" if any(with_weights) else None


def _plain(layer: nn.Module, role: Role, path: str, model: str) -> nn.Module:
    """The layer if its weights can be split."""
    if hasattr(layer, "base_layer") and not getattr(layer, "merged", False):
        raise UnsupportedError(
            f"{path} of {model} has a LoRA, which tensor parallelism cannot split; "
            "call pipe.fuse_lora() and pipe.unload_lora_weights() first, or use tensor=1"
        )
    layer = _base(layer)
    parameters = tuple(layer.parameters(recurse=False))
    if any(hasattr(layer, hook) for hook in _HOOKS):
        raise UnsupportedError(
            f"{path} of {model} is offloaded, and tensor parallelism splits weights where they stay; "
            "turn the offload off (pipe.remove_all_hooks()), or use tensor=1"
        )
    if stock_class(layer) not in _KINDS[role] or not all(map(_is_plain, parameters)):
        raise UnsupportedError(
            f"{path} of {model} is a {stock_class(layer).__name__} with weights of {_kinds_of(parameters)}, which "
            "tensor parallelism cannot split; load the model without quantisation, or use tensor=1"
        )
    assert type(layer) is stock_class(layer), f"{path} is ours already"
    return layer


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _is_plain(parameter: nn.Parameter) -> bool:
    wide_enough = parameter.is_floating_point() and parameter.element_size() > 1
    return type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor and wide_enough


def _kinds_of(parameters: tuple[nn.Parameter, ...]) -> str:
    return " and ".join(sorted({f"{type(each.data).__name__} {each.dtype}" for each in parameters})) or "no parameters"


def _split_dim(role: Role, layer: nn.Module) -> int:
    """Outputs are the first dimension of a linear's weight, and the last of an embedding's."""
    return 1 if role == "row" or isinstance(layer, nn.Embedding) else 0


def _count(module: nn.Module, attribute: str) -> Count:
    path, _, name = attribute.rpartition(".")
    owner = _descendant(module, path) if path else module
    assert owner is not None, f"no {path} to count heads in"
    if getattr(owner, "fused_projections", False):
        raise UnsupportedError(
            f"{stock_class(owner).__name__} has fused projections, which tensor parallelism cannot split; "
            "call its model's unfuse_qkv_projections() first, or use tensor=1"
        )
    return Count(owner, name)


def _without_tied(model: nn.Module, units: list[_Unit]) -> tuple[list[_Unit], list[str]]:
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    tied: list[str] = []
    while True:
        split = {(layer.module, dim) for unit in units for layer in unit.layers for _, _, dim in layer.parameters()}
        loose = [
            unit
            for unit in units
            for layer in unit.layers
            for _, parameter, dim in layer.parameters()
            if any((owner, dim) not in split for owner in owners[parameter])
        ]
        if not loose:
            return units, tied
        tied += [unit.path for unit in loose]
        units = [unit for unit in units if unit not in loose]


def _matching(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    found = [("", model)]
    for name in pattern.split(".") if pattern else ():
        found = [
            (f"{path}.{child}".lstrip("."), module)
            for path, parent in found
            for child, module in parent.named_children()
            if name in ("*", child)
        ]
    return found


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module
