"""The signature of a forward: what a CUDA graph of it holds fast of its arguments and surroundings.

Two forwards of one signature differ in nothing but the numbers in their tensors, which are copied into the graph.
Everything else that Python sees counts by its value: sizes in nested lists, scales, flags, None.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pipeboost.core.fingerprint import structure

_TENSORS = (torch.Tensor, torch.nn.Parameter)


class NotCapturable(Exception):  # noqa: N818 - not an error: the forward runs without a graph
    """Why a forward cannot be captured, in words that follow "eager: "."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a forward, read.

    Attributes:
        key: all but the numbers in the tensors.
        tensors: the tensors, in the order in which they were found.
    """

    key: Hashable
    tensors: tuple[torch.Tensor, ...]


def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Read the arguments of a forward; tensors may stand in tuples, lists and dicts, and count once.

    Raises:
        NotCapturable: one is of a type whose value cannot be compared.
    """
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def layout(tensor: torch.Tensor) -> Hashable:
        if type(tensor) not in _TENSORS:
            raise _incomparable(tensor)
        place, _ = found.setdefault(id(tensor), (len(found), tensor))
        return place, tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    key = structure((args, kwargs), tensor=layout, other=_of_enum)
    return Arguments(key, tuple([tensor for _, tensor in found.values()]))


def exchanged(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with the tensors `after` in the places of those `before`, which `read` found in them.

    Raises:
        NotCapturable: one of them is in a container of another type.
    """
    others = dict(zip(map(id, before), after, strict=True))
    leaves, form = pytree.tree_flatten((args, dict(kwargs)))
    if not others.keys() <= set(map(id, leaves)):
        raise NotCapturable("it is given a tensor in a container that is no tuple, list or dict")
    return pytree.tree_unflatten([others.get(id(leaf), leaf) for leaf in leaves], form)


def copied(output: Any) -> Any:
    """Return what a forward returned, with tensors of its own.

    Raises:
        NotCapturable: something in it may hold a tensor out of sight.
    """
    return pytree.tree_map(_copied_leaf, output)


def _copied_leaf(leaf: Any) -> Any:
    if type(leaf) in _TENSORS:
        return leaf.clone()
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    raise NotCapturable(f"it returns a {type(leaf).__name__}")


def _of_enum(value: Any, _: Callable[[Any], Hashable]) -> Hashable:
    if isinstance(value, enum.Enum):
        return value
    raise _incomparable(value)


def _incomparable(value: Any) -> NotCapturable:
    return NotCapturable(f"it is given a {type(value).__name__}, whose value cannot be compared")


def with_writes(
    run: Callable[..., Any], arguments: Arguments, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, bool]:
    """Run a forward; return its output, and whether it has written to its arguments, which `read` gave."""
    versions = _versions(arguments)
    output = run(*args, **kwargs)
    try:
        after = read(args, kwargs)
    except NotCapturable:
        return output, True
    return output, after.key != arguments.key or _versions(after) != versions


def _versions(arguments: Arguments) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in arguments.tensors]
