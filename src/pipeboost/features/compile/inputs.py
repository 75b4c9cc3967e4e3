"""What is done to the arguments of a compiled module, so that those of the next block or prompt fit its graph.

*Strides.* A block of joint attention returns two slices of one tensor. Their strides differ from those of the first
block's inputs and, where the other slice is the text, with every prompt; Dynamo guards on strides. So tensors are made
dense: with a batch of one they are so already and only the strides are written anew, larger batches are copied.

*Views.* Dynamo also guards on the shape of the tensor that another is a view of, which differs between the first block
and the others. So each tensor becomes an alias that is a view of nothing (not with gradients, which that would cut).

*Text lengths.* Aliases of tensors whose size follows the prompt are marked dynamic. Dynamo reads the marks only where
it compiles, but which call that will be is not known beforehand (a new adapter or image size), so every call marks. The
marks are weak: a kernel that needs the exact length makes Dynamo compile one graph per length, where a strict mark
would raise. A text of one token gets a graph of its own, since Dynamo treats size 1 apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import maybe_mark_dynamic

from pipeboost.core.seams import signature_of, stock_class


@dataclass(frozen=True)
class TextArgument:
    """One tensor among a module's arguments, and which of its dimensions is the text length.

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


def text_arguments(module: nn.Module, text_dims: Mapping[str, int]) -> tuple[TextArgument, ...]:
    """Find the arguments that `Blocks.text_dims` names in the signature of a module's stock `forward`."""
    parameters = forward_parameters(module)
    arguments = []
    for path, dim in text_dims.items():
        name, _, item = path.partition(".")
        assert name in parameters, f"{stock_class(module).__name__}.forward has no argument {name!r}"
        arguments.append(TextArgument(name, parameters.index(name), int(item) if item else None, dim))
    return tuple(arguments)


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's stock `forward`, in order, without `self`."""
    return list(signature_of(stock_class(module), "forward").parameters)[1:]


def aliased(value: Any) -> Any:
    """Tensors, alone or in tuples, lists and dicts, as dense aliases; anything else as it is."""
    if type(value) is torch.Tensor:
        if not value.is_contiguous():
            return value.contiguous()
        if value.dim() and value.shape[0] == 1 and value.stride(0) != value.numel():
            value = value.as_strided(value.shape, (value.numel(), *value.stride()[1:]))
        return value if torch.is_grad_enabled() else value.data
    if type(value) in (tuple, list):
        return type(value)(map(aliased, value))
    if type(value) is dict:
        return {key: aliased(item) for key, item in value.items()}
    return value
