"""`linear(cat([a, b], dim=-1))` as a sum of products, each with its columns of the weight: nothing is concatenated.

FLUX's and HunyuanVideo's single blocks do this to the outputs of attention and MLP. The columns are views of the
weight. The partial sum is rounded to the tensors' precision once more than in one product.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import batch_of, linear_arguments, replace, tensor_of

_ALIGNMENT = 16
"""Bytes: columns that begin elsewhere than at a multiple cost a GEMM its fast path."""


def multiply_parts(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many products over concatenated features there were."""
    count = 0
    for linear in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        arguments = linear_arguments(linear)
        parts = None if arguments is None else _concatenated(arguments[0])
        if arguments is None or parts is None:
            continue
        x, weight, bias = arguments
        total, begin = bias, 0
        with graph.inserting_before(linear):
            for part, width in parts:
                columns = (slice(None), slice(begin, begin + width))
                transposed = graph.call_method("t", (graph.call_function(operator.getitem, (weight, columns)),))
                total = graph.call_function(
                    torch.addmm, (total, graph.call_method("flatten", (part, 0, 1)), transposed)
                )
                begin += width
            result = graph.call_method("unflatten", (total, 0, (batch_of(x), -1)))
        replace(linear, result)
        count += 1
    return count


def _concatenated(node: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """What is concatenated along the last dimension for one product alone, and how wide each part is."""
    if node.target is not torch.cat or len(node.users) > 1:
        return None
    parts: Any = node.args[0]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    tensors = [tensor_of(part) for part in parts] if isinstance(parts, (list, tuple)) else [None]
    if dim not in (-1, 2) or not all(tensor is not None and isinstance(tensor.shape[-1], int) for tensor in tensors):
        return None
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    widths = [int(tensor.shape[-1]) for tensor in tensors if tensor is not None]
    fits = len(dtypes) == 1 and all(width * dtypes.copy().pop().itemsize % _ALIGNMENT == 0 for width in widths)
    return list(zip(parts, widths, strict=True)) if fits else None
