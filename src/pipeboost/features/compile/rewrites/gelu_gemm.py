"""`gelu(linear(x), approximate="tanh")` as one GEMM whose epilogue is the GELU: the hidden states are written once.

cuBLASLt's GELU is the tanh form. `torch._addmm_activation` uses it for half-precision CUDA tensors with a bias of one
dimension; on a CPU it computes the form with the error function, so nothing is rewritten there.
"""

from __future__ import annotations

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import batch_of, linear_arguments, replace, suits_our_kernels, tensor_of


def gelu_in_gemm(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many GELUs moved into their GEMM."""
    count = 0
    for gelu in graph.find_nodes(op="call_function", target=torch._C._nn.gelu):
        linear = gelu.args[0] if gelu.args else None
        arguments = linear_arguments(linear)
        if gelu.kwargs.get("approximate") != "tanh" or arguments is None or len(linear.users) > 1:  # type: ignore[union-attr]
            continue
        x, weight, bias = arguments
        if not suits_our_kernels(tensor_of(x)):
            continue
        with graph.inserting_before(gelu):
            rows = graph.call_method("flatten", (x, 0, 1))
            transposed = graph.call_method("t", (weight,))
            product = graph.call_function(torch._addmm_activation, (bias, rows, transposed), {"use_gelu": True})
            result = graph.call_method("unflatten", (product, 0, (batch_of(x), -1)))
        replace(gelu, result)
        count += 1
    return count
