"""The quantisation of activations to 8 bits inside what computes them: a modulated norm, a GELU, a concatenation.

What several linears quantise, such as the input of queries, keys and values, is quantised once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import (
    concatenated,
    erase_unused,
    replace,
    suits_our_kernels,
    tensor_of,
    without_casts,
)
from pipeboost.kernels import float8  # noqa: F401 - declares the operators


def quantise_in_producers(graph: fx.Graph) -> int:
    """Rewrite a graph; return how often a quantisation became part of what computes its input."""
    count = 0
    for source, quantised in _by_source(graph).items():
        first, *others = quantised
        for node in others:
            replace(node, first)
        with graph.inserting_before(first):
            result = _norm_quantised(graph, source) or _parts_quantised(graph, source)
        if result is None:
            continue
        pair = {0: result[0], 1: result[1]}
        for user in list(first.users):
            replace(user, pair[user.args[1]])  # type: ignore[index]
        erase_unused(graph, [first])
        count += 1
    return count


def _by_source(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Tensors in 16 bits that are quantised by rows → the nodes that do it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.pipeboost.quantise_rows.default):
        rows: Any = node.args[0][0]
        x = rows.args[0] if rows.target == "reshape" else rows
        if suits_our_kernels(tensor_of(x)) and all(user.target is operator.getitem for user in node.users):
            found.setdefault(x, []).append(node)
    return found


def _norm_quantised(graph: fx.Graph, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    both: Any = x.args[0] if x.target is operator.getitem and x.args[1] == 1 else None
    if both is None or both.target is not torch.ops.pipeboost.modulated_norm.default:
        return None
    if any(user.target != "reshape" for user in x.users):  # it is needed in 16 bits too
        return None
    with graph.inserting_before(both):
        norm = graph.call_function(torch.ops.pipeboost.modulated_norm_float8.default, both.args)
        total, rows, scale = (graph.call_function(operator.getitem, (norm, place)) for place in range(3))
    for user in list(both.users):
        if user.args[1] == 0:
            replace(user, total)
    return rows, scale


def _parts_quantised(graph: fx.Graph, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    x = without_casts(x)
    joined = concatenated(x) or [x]
    inner = [_before_gelu(part) for part in joined]
    if len(joined) > 2 or (len(joined) == 1 and inner[0] is None):
        return None
    parts = [
        graph.call_method("flatten", (part if own is None else own, 0, -2))
        for part, own in zip(joined, inner, strict=True)
    ]
    gelu = [own is not None for own in inner]
    pair = graph.call_function(torch.ops.pipeboost.quantise_rows.default, (parts, gelu))
    return graph.call_function(operator.getitem, (pair, 0)), graph.call_function(operator.getitem, (pair, 1))


def _before_gelu(node: Any) -> Any:
    """What a GELU of the tanh form is taken of; None where a node is none."""
    node = without_casts(node)
    if node.target is not torch._C._nn.gelu or node.kwargs.get("approximate") != "tanh":
        return None
    return node.args[0]
