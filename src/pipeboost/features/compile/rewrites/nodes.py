"""What rewrites ask of the nodes of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def tensor_of(node: Any) -> torch.Tensor | None:
    """Return the fake tensor that stands for a node's value: its shape, dtype and device; None where it has none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def replace(node: fx.Node, result: fx.Node) -> None:
    """Let another node stand for one, and erase what only that one has needed."""
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    unused = [node]
    while unused:
        last = unused.pop()
        if not last.users and last.op.startswith("call_") and not last._erased:
            unused += last.all_input_nodes
            node.graph.erase_node(last)


def linear_arguments(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return input, weight and bias of a linear over `(batch, tokens, features)`; None where it is not one with a bias.

    The batch size and the features are known numbers, so that the result can be put back into this shape.
    """
    if not isinstance(node, fx.Node) or node.target is not torch._C._nn.linear:
        return None
    arguments = (*node.args, *node.kwargs.values())
    x, weight, bias = (*arguments, None)[:3]
    value = tensor_of(x)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node) or value is None:
        return None
    known = value.dim() == 3 and isinstance(value.shape[0], int) and isinstance(value.shape[2], int)
    return (x, weight, bias) if known else None


def batch_of(node: fx.Node) -> int:
    """Return the batch size of a node that `linear_arguments` has returned."""
    value = tensor_of(node)
    assert value is not None
    return int(value.shape[0])
