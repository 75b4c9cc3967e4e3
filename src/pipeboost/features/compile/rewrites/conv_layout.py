"""Convolutions over frames with the channels of a pixel side by side, as inductor has those over pictures by itself.

Without it the GPU's library rewrites the input and the output of each convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import suits_our_kernels, tensor_of


def lay_out_convolutions(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many convolutions over frames take their weight, and so give their output, so.

    The weight is copied at each use, which takes a thousandth of the convolution's time.
    """
    count = 0
    for convolution in graph.find_nodes(op="call_function", target=torch.conv3d):
        weight = convolution.args[1] if len(convolution.args) > 1 else None
        if not isinstance(weight, fx.Node) or not suits_our_kernels(tensor_of(weight)):
            continue
        layout: dict[str, Any] = {"memory_format": torch.channels_last_3d}
        with graph.inserting_before(convolution):
            convolution.update_arg(1, graph.call_method("contiguous", (weight,), layout))
        count += 1
    return count
