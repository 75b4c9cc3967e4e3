"""The repeated blocks of a model that no family names: those that Diffusers does, else what its structure shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from pipeboost.core.seams import stock_class

# A list of modules with less of the model's weights than this is not where its time goes.
_WORTHWHILE_SHARE = 0.1


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks by their paths, none inside another."""
    declared = dict(_outermost(model, getattr(model, "_repeated_blocks", None) or (), ""))
    return declared or dict(_in_longest_lists(model, _size(model), ""))


def _outermost(model: nn.Module, names: Sequence[str], path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the classes that Diffusers names, but none inside another."""
    for name, child in model.named_children():
        inner = f"{path}{name}"
        if stock_class(child).__name__ in names:
            yield inner, child
        else:
            yield from _outermost(child, names, f"{inner}.")


def _in_longest_lists(model: nn.Module, total: int, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules in outermost lists of modules of one class that hold a good part of the model's weights."""
    for name, child in model.named_children():
        inner = f"{path}{name}."
        alike = isinstance(child, nn.ModuleList) and len(child) > 1 and len(set(map(stock_class, child))) == 1
        if alike and _size(child) >= _WORTHWHILE_SHARE * total:
            yield from ((f"{inner}{index}", member) for index, member in enumerate(child.children()))
        else:
            yield from _in_longest_lists(child, total, inner)


def _size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensors in (module.parameters(), module.buffers()) for tensor in tensors)
