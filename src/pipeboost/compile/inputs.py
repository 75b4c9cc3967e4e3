"""What is done to the arguments of a block, so that those of the next block or prompt fit the graph of the first.

*Strides.* A block of joint attention returns two slices of one tensor. Their strides differ from those of the first
block's inputs and, where the other slice is the text, with every prompt; Dynamo guards on strides. So a block is given
dense tensors: a batch of one is dense already and only its strides are written anew, larger batches are copied.

*Text lengths.* The tensors whose size follows the prompt are marked dynamic. Dynamo reads the marks only where it
compiles, but which call that will be is not known beforehand (an adapter, a new image size), and a block's output is a
new tensor without them: every call marks, at about a microsecond a tensor. The marks are weak ones: a kernel that needs
the exact length makes Dynamo compile one graph per length, where a strict mark would raise. A text of one token gets a
graph of its own, since Dynamo treats size 1 apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import maybe_mark_dynamic

from pipeboost.seams import stock_class


@dataclass(frozen=True)
class TextArgument:
    """One tensor among a block's arguments, and which of its dimensions is the text length.

    Attributes:
        name: the argument.
        position: where it stands when it is given by position.
        item: the index in the argument where that is a tuple of tensors, else None.
        dim: the dimension.
    """

    name: str
    position: int
    item: int | None
    dim: int

    def mark(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Mark the tensor in the arguments of a call, if it is among them."""
        value = args[self.position] if self.position < len(args) else kwargs.get(self.name)
        if self.item is not None and value is not None:
            value = value[self.item]
        if isinstance(value, torch.Tensor):
            maybe_mark_dynamic(value, self.dim)


def dense(value: Any) -> Any:
    """A tensor with the strides that its shape gives, without a copy where its elements lie in order already."""
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_contiguous():
        return value.contiguous()
    if value.dim() and value.shape[0] == 1 and value.stride(0) != value.numel():
        return value.as_strided(value.shape, (value.numel(), *value.stride()[1:]))
    return value


def text_arguments(module: nn.Module, text_dims: Mapping[str, int]) -> tuple[TextArgument, ...]:
    """Find the arguments that `Blocks.text_dims` names in the signature of a module's stock `forward`."""
    parameters = list(inspect.signature(stock_class(module).forward).parameters)[1:]
    arguments = []
    for path, dim in text_dims.items():
        name, _, item = path.partition(".")
        assert name in parameters, f"{stock_class(module).__name__}.forward has no argument {name!r}"
        arguments.append(TextArgument(name, parameters.index(name), int(item) if item else None, dim))
    return tuple(arguments)
