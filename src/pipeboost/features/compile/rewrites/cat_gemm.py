"""`linear(cat([a, b], dim=-1))` as a sum of products, each with its columns of the weight: nothing is concatenated.

FLUX's and HunyuanVideo's single blocks do this to the outputs of attention and MLP. The columns are views of the
weight. The partial sum is rounded to the tensors' precision once more than in one product.
"""

from __future__ import annotations

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import batch_of, concatenated, linear_arguments, replace, tensor_of
from pipeboost.kernels import products  # noqa: F401 - declares the operator

_ALIGNMENT = 16
"""Bytes: columns that begin elsewhere than at a multiple cost a GEMM its fast path."""


def multiply_parts(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many products over concatenated features there were."""
    count = 0
    for linear in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        arguments = linear_arguments(linear)
        parts = None if arguments is None else concatenated(arguments[0])
        if arguments is None or parts is None or not all(map(_is_aligned, parts)):
            continue
        x, weight, bias = arguments
        with graph.inserting_before(linear):
            rows = [graph.call_method("flatten", (part, 0, 1)) for part in parts]
            total = graph.call_function(torch.ops.pipeboost.linear_of_parts.default, (rows, weight, bias))
            result = graph.call_method("unflatten", (total, 0, (batch_of(x), -1)))
        replace(linear, result)
        count += 1
    return count


def _is_aligned(part: fx.Node) -> bool:
    value = tensor_of(part)
    assert value is not None
    return value.shape[-1] * value.itemsize % _ALIGNMENT == 0
