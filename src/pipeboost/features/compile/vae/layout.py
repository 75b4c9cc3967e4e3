"""A backend of torch.compile in which convolutions over frames compute with the channels of a pixel side by side.

Inductor does so for pictures by itself. Without it the GPU's library rewrites the input and output of each convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

_CONVOLUTIONS = (torch.conv3d, F.conv3d)


def inductor_channels_last(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph with inductor, the weights of its convolutions over frames in channels-last layout."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(lay_out(graph), inputs)  # type: ignore[no-any-return, arg-type]


def lay_out(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Let convolutions over frames take their weights in channels-last layout, and so give their output."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _CONVOLUTIONS:
            with graph.graph.inserting_before(node):
                layout = {"memory_format": torch.channels_last_3d}
                node.update_arg(1, graph.graph.call_method("contiguous", (node.args[1],), layout))
    graph.recompile()
    return graph
