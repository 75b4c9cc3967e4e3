"""A product of complex numbers in real arithmetic: inductor generates no code for complex operators.

Rotary embeddings such as Qwen-Image's are written `view_as_real(view_as_complex(x) * frequencies)`. Written out in real
numbers they are fused with what stands before and after them.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import replace, tensor_of


def rotate_in_real_numbers(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many complex products became real."""
    count = 0
    for real in graph.find_nodes(op="call_function", target=torch.view_as_real):
        product = real.args[0]
        if not isinstance(product, fx.Node) or product.target not in (operator.mul, torch.mul):
            continue
        one, other = product.args[:2]
        if getattr(one, "target", None) is not torch.view_as_complex:
            one, other = other, one
        value = tensor_of(other)
        if not isinstance(one, fx.Node) or one.target is not torch.view_as_complex or value is None:
            continue
        if not value.is_complex() or value.is_conj():
            continue
        with graph.inserting_before(real):
            factor = graph.call_function(torch.view_as_real, (other,))
            (a, b), (c, d) = (
                [graph.call_method("select", (pair, -1, index)) for index in (0, 1)] for pair in (one.args[0], factor)
            )
            products = {pair: graph.call_function(operator.mul, pair) for pair in ((a, c), (b, d), (a, d), (b, c))}
            parts = [
                graph.call_function(operator.sub, (products[a, c], products[b, d])),
                graph.call_function(operator.add, (products[a, d], products[b, c])),
            ]
            result = graph.call_function(torch.stack, (parts,), {"dim": -1})
        replace(real, result)
        count += 1
    return count
