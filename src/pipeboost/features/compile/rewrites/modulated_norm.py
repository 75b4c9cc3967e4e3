"""A gated residual, the layer norm of the sum and its modulation, in one pass over memory.

Matched are `layer_norm(x) * (1 + scale) + shift` and layer norms with a weight and a bias, where `x` may be
`residual + gate * branch`. Casts in between do not matter: all is computed in float32, and rounded where the graph
keeps a value in 16 bits.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import operands, replace, suits_our_kernels, tensor_of, without_casts
from pipeboost.kernels import norms  # noqa: F401 - declares the operator


class _Norm(NamedTuple):
    x: Any
    scale: fx.Node
    shift: fx.Node
    eps: float
    one_plus: bool


def fuse_norms(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many norms became one kernel with what stands around them."""
    count = 0
    for node in list(graph.nodes):
        value = None if node._erased else tensor_of(node)
        if value is None or not suits_our_kernels(value) or value.dim() != 3:
            continue
        norm = _norm(without_casts(node), value)
        x = None if norm is None else _rounded(norm.x)
        if norm is None or x is None:
            continue
        given = tensor_of(x)
        if given is None or given.shape != value.shape or given.dtype != value.dtype:  # tables may have more samples
            continue
        residual, branch, gate = _summands(without_casts(x), value.dtype) or (x, None, None)
        with graph.inserting_before(node):
            arguments = (residual, branch, gate, norm.scale, norm.shift, norm.eps, norm.one_plus)
            both = graph.call_function(torch.ops.pipeboost.modulated_norm.default, arguments)
            total, result = (graph.call_function(operator.getitem, (both, index)) for index in (0, 1))
        replace(node, result)
        if branch is not None and not x._erased:
            replace(x, total, users=lambda user, after=both: user > after)  # type: ignore[misc]
        count += 1
    return count


def _norm(node: Any, value: torch.Tensor) -> _Norm | None:
    """What is normalised, scaled and shifted, where a node is that."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is torch.nn.functional.layer_norm and not node.kwargs:
        x, shape, weight, bias, eps = _arguments(node)
        scale, shift, one_plus = without_casts(weight), without_casts(bias), False
    else:
        scaled, shift = operands(node, operator.add, lambda each: _scaled(each) is not None)
        found = _scaled(scaled)
        if found is None:
            return None
        normed, scale = found
        x, shape, _, _, eps = _arguments(normed)
        one_plus = True
    fits = tuple(shape) == (value.shape[-1],) and all(_is_per_feature(each, value) for each in (scale, shift))
    return _Norm(x, scale, shift, float(eps), one_plus) if fits else None


def _arguments(norm: Any) -> tuple[Any, ...]:
    """Input, shape, weight, bias and eps of a layer norm."""
    return (*norm.args, None, None, 1e-5)[:5]


def _scaled(node: Any) -> tuple[fx.Node, Any] | None:
    """The layer norm and the scale, where a node is the one times 1 + the other."""
    normed, factor = operands(node, operator.mul, _is_plain_norm)
    _, scale = operands(factor, operator.add, lambda each: type(each) in (int, float) and each == 1)
    return None if scale is None else (without_casts(normed), scale)


def _is_plain_norm(node: Any) -> bool:
    inner = without_casts(node)
    is_norm = isinstance(inner, fx.Node) and inner.target is torch.nn.functional.layer_norm and not inner.kwargs
    return is_norm and all(each is None for each in inner.args[2:4])


def _is_per_feature(node: Any, value: torch.Tensor) -> bool:
    """Whether a node has a number for each feature, of all samples or of each."""
    table = tensor_of(node)
    if table is None or table.dim() == 0 or table.shape[-1] != value.shape[-1]:
        return False
    samples = table.dim() == 3 and table.shape[1] == 1 and table.shape[0] == value.shape[0]
    return samples or all(size == 1 for size in table.shape[:-1])


def _rounded(x: Any) -> Any:
    """The value in 16 bits that is normalised, under its casts; None where it is kept in more."""
    while not suits_our_kernels(tensor_of(x)):
        inner = x.args[0] if isinstance(x, fx.Node) and without_casts(x) is not x else None
        if inner is None:
            return None
        x = inner
    return x


def _summands(total: Any, dtype: torch.dtype) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Residual, branch and gate, where a node is a sum of two such tensors; the gate is None where there is none.

    The first two have this dtype.
    """
    for is_branch in (lambda each: _gated(each) is not None, lambda each: True):
        found = operands(total, operator.add, is_branch)
        if found[0] is None:
            continue
        branch, gate = _gated(found[0]) or (without_casts(found[0]), None)
        residual = without_casts(found[1])
        one, other = tensor_of(residual), tensor_of(branch)
        if one is not None and other is not None and one.shape == other.shape and one.dtype == other.dtype == dtype:
            return residual, branch, gate
    return None


def _gated(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Branch and gate, where a node is their product."""
    node = without_casts(node)
    value = tensor_of(node)
    if value is None:
        return None
    gate, branch = operands(node, operator.mul, lambda each: _is_per_feature(each, value))
    branch = without_casts(branch)
    given = tensor_of(branch)
    return None if gate is None or given is None or given.shape != value.shape else (branch, gate)
