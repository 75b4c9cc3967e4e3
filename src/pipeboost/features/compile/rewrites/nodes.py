"""What rewrites ask of the nodes of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

_OPERATORS = {operator.add: torch.add, operator.mul: torch.mul}


def tensor_of(node: Any) -> torch.Tensor | None:
    """Return the fake tensor that stands for a node's value: its shape, dtype and device; None where it has none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def suits_our_kernels(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is one that the Triton kernels of `kernels/norms.py` and cuBLASLt's epilogues are for."""
    return tensor is not None and tensor.device.type == "cuda" and tensor.dtype in (torch.bfloat16, torch.float16)


def without_casts(node: Any) -> Any:
    """Return what a node is a copy of in another floating-point dtype, or after a dropout that drops nothing."""
    while isinstance(node, fx.Node) and node.args:
        cast = node.op == "call_method" and node.target in ("float", "to", "type_as") and tensor_of(node) is not None
        dropout = node.target is torch.nn.functional.dropout and tuple(node.args[1:3]) == (0.0, False)
        inner = tensor_of(node.args[0])
        if not (cast or dropout) or inner is None or not inner.is_floating_point():
            break
        node = node.args[0]
    return node


def operands(node: Any, operation: Any, first: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """Return the two operands of a sum or product, that one in front for which `first` holds; None where none is so.

    Args:
        operation: `operator.add` or `operator.mul`.
    """
    if not isinstance(node, fx.Node) or node.target not in (operation, _OPERATORS[operation]) or len(node.args) != 2:
        return None
    one, other = node.args
    if first(one):
        return one, other
    return (other, one) if first(other) else None


def replace(node: fx.Node, result: fx.Node, *, users: Callable[[fx.Node], bool] = lambda user: True) -> None:
    """Let another node stand for one, for these users of it, and erase what only that one has needed."""
    result.meta.setdefault("example_value", node.meta.get("example_value"))
    node.replace_all_uses_with(result, delete_user_cb=users)
    erase_unused(node.graph, [node])


def erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that nothing uses, and what only they have needed."""
    unused = list(nodes)
    while unused:
        node = unused.pop()
        if not node.users and node.op.startswith("call_") and not node._erased:
            unused += node.all_input_nodes
            graph.erase_node(node)


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
