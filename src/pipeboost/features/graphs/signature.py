"""The signature of a forward: what a CUDA graph of it holds fast of its arguments and surroundings.

Two forwards of one signature differ in nothing but the numbers in their tensors, which are copied into the graph.
Everything else that Python sees counts by its value: sizes in nested lists, scales, flags, None.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_PLAIN = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
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
    """Read the arguments of a forward; tensors may stand in tuples, lists and dicts.

    Raises:
        NotCapturable: one is of a type whose value cannot be compared.
    """
    tensors: list[torch.Tensor] = []
    key = (tuple([_key(value, tensors) for value in args]), _keys(kwargs, tensors))
    return Arguments(key, tuple(tensors))


def exchanged(value: Any, tensors: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same arguments with `tensors(each)` in the place of each tensor, in the order in which `read` finds them."""
    if type(value) in _TENSORS:
        return tensors(value)
    if type(value) in (tuple, list):
        return type(value)([exchanged(item, tensors) for item in value])
    if type(value) is dict:
        return {name: exchanged(item, tensors) for name, item in value.items()}
    return value


def copied(output: Any) -> Any:
    """What a forward returned, with tensors of its own.

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


def _keys(values: Mapping[Any, Any], tensors: list[torch.Tensor]) -> Hashable:
    return tuple([(_key(name, tensors), _key(value, tensors)) for name, value in values.items()])


def _key(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    kind = type(value)
    if kind in _TENSORS:
        tensors.append(value)
        return ("tensor", value.shape, value.stride(), value.dtype, value.device)
    if kind is float:
        # NaN equals nothing, and 0.0 equals -0.0.
        return (kind, value.hex())
    if kind in _PLAIN or isinstance(value, enum.Enum):
        return (kind, value)
    if kind in (tuple, list):
        return (kind, tuple([_key(item, tensors) for item in value]))
    if kind is dict:
        return (kind, _keys(value, tensors))
    raise NotCapturable(f"it is given a {kind.__name__}, whose value cannot be compared")
