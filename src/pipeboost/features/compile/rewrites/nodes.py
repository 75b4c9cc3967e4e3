"""What rewrites ask of the nodes of a graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeboost.kernels.merge import has_triton

_NAMES = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "imatmul", "iand", "ior", "ixor")
IN_PLACE = frozenset(getattr(operator, name) for name in _NAMES)
"""What `+=` and its like are in a graph."""
_OPERATORS = {operator.add: torch.add, operator.mul: torch.mul}


def tensor_of(node: Any) -> torch.Tensor | None:
    """Return the fake tensor that stands for a node's value: its shape, dtype and device; None where it has none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def storage_of(node: Any) -> int | None:
    """Return what a node's value and all views of it have in common; None where it is no tensor."""
    value = tensor_of(node)
    return None if value is None or is_traceable_wrapper_subclass(value) else value.untyped_storage()._cdata


def suits_our_kernels(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is one that the Triton kernels of `kernels/norms.py` and cuBLASLt's epilogues are for."""
    if tensor is None or tensor.device.type != "cuda" or not has_triton():
        return False
    return tensor.dtype in (torch.bfloat16, torch.float16)


def without_casts(node: Any) -> Any:
    """Return what a node is a copy of in another dtype of 16 bits or more, or after a dropout that drops nothing."""
    while isinstance(node, fx.Node) and node.args:
        cast = node.op == "call_method" and node.target in ("float", "to", "type_as") and tensor_of(node) is not None
        dropout = node.target is torch.nn.functional.dropout and tuple(node.args[1:3]) == (0.0, False)
        own, inner = tensor_of(node), tensor_of(node.args[0])
        if not (cast or dropout) or own is None or inner is None or own.device != inner.device:
            break
        if not all(each.is_floating_point() and each.itemsize > 1 for each in (own, inner)):
            break
        node = node.args[0]
    return node


def operands(node: Any, operation: Any, first: Callable[[Any], bool]) -> tuple[Any, Any]:
    """Return the two operands of a sum or product, that one in front for which `first` holds; twice None if none does.

    Args:
        operation: `operator.add` or `operator.mul`.
    """
    if not isinstance(node, fx.Node) or node.target not in (operation, _OPERATORS[operation]) or len(node.args) != 2:
        return None, None
    if node.kwargs:  # such as a factor of the second summand
        return None, None
    one, other = node.args
    if first(one):
        return one, other
    return (other, one) if first(other) else (None, None)


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
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    x, weight, bias = (given.get(name) for name in ("input", "weight", "bias"))
    tensors = [tensor_of(each) for each in (x, weight, bias, node)]
    value = tensors[0]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node) or value is None:
        return None
    known = value.dim() == 3 and isinstance(value.shape[0], int) and isinstance(value.shape[2], int)
    # Autocast gives a product another dtype than its input, and subclasses of tensors have products of their own.
    plain = all(
        each is not None and each.dtype == value.dtype and not is_traceable_wrapper_subclass(each) for each in tensors
    )
    return (x, weight, bias) if known and plain else None


def concatenated(node: fx.Node) -> list[fx.Node] | None:
    """Return tensors of three dimensions and one dtype that a node joins along the last one, for one user alone."""
    if node.target is not torch.cat or len(node.users) > 1:
        return None
    parts: Any = node.args[0]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    tensors = [tensor_of(part) for part in parts] if isinstance(parts, (list, tuple)) else [None]
    known = all(each is not None and each.dim() == 3 and isinstance(each.shape[-1], int) for each in tensors)
    alike = len({each.dtype for each in tensors if each is not None}) == 1
    return list(parts) if dim in (-1, 2) and known and alike else None


def batch_of(node: fx.Node) -> int:
    """Return the batch size of a node that `linear_arguments` has returned."""
    value = tensor_of(node)
    assert value is not None
    return int(value.shape[0])


def writes_in_place(graph: fx.Graph) -> bool:
    """Return whether anything is written over that may be read before and after.

    Entries of an empty tensor do not count, which only they make one that can be read.
    """
    return any(map(_writes, graph.nodes))


def _writes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if node.target is operator.setitem:
        return getattr(node.args[0], "target", None) is not torch.empty_like
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if getattr(operator, name, None) is node.target:  # among them `and_`, which writes nowhere
        return node.target in IN_PLACE and not _is_only_written(node)
    return name.endswith("_") or node.kwargs.get("out") is not None or _is_told_to_write(node)


def _is_only_written(node: fx.Node) -> bool:
    """Whether what `+=` and its like write over was made in the graph, and is read by nothing but them."""
    storage = storage_of(node.args[0])
    return storage is not None and all(
        before.op.startswith("call_") and len(before.users) == 1
        for before in node.graph.nodes
        if before < node and storage_of(before) == storage
    )


def _is_told_to_write(node: fx.Node) -> bool:
    """Whether it is called with `inplace=True`, by name or by place."""
    if not any(each is True for each in (*node.args, *node.kwargs.values())):
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return given.arguments.get("inplace") is True
