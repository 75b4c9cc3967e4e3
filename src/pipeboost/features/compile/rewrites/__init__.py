"""Rewrites: passes over a captured graph, after which it computes the same in the same precision with less work.

They run on Dynamo's graph, in the operators that the model's code names, before a backend sees it. They look at the
structure alone, so they serve any model that has it; a pass that finds nothing changes nothing. Graphs that write over
tensors in place, or of which gradients are taken, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pipeboost.features.compile.rewrites.cat_gemm import multiply_parts
from pipeboost.features.compile.rewrites.cat_of_slices import drop_cats_of_slices
from pipeboost.features.compile.rewrites.conv_layout import lay_out_convolutions
from pipeboost.features.compile.rewrites.float8_rows import quantise_in_producers
from pipeboost.features.compile.rewrites.gelu_gemm import gelu_in_gemm
from pipeboost.features.compile.rewrites.modulated_norm import fuse_norms
from pipeboost.features.compile.rewrites.nodes import writes_in_place
from pipeboost.features.compile.rewrites.norm_rotary import fuse_norms_and_rotations
from pipeboost.features.compile.rewrites.real_rotary import rotate_in_real_numbers

REWRITES: dict[str, Callable[[fx.Graph], int]] = {
    "cat_of_slices": drop_cats_of_slices,
    "norm_rotary": fuse_norms_and_rotations,
    "modulated_norm": fuse_norms,
    "float8_rows": quantise_in_producers,  # among them the norms above
    "real_rotary": rotate_in_real_numbers,
    "gelu_gemm": gelu_in_gemm,
    "conv_layout": lay_out_convolutions,
    "cat_gemm": multiply_parts,  # what is concatenated may be a product that a pass above has changed
}


class RewritingBackend:
    """A torch.compile backend that rewrites what it is given and hands it on to another.

    Args:
        backend: the name of a backend, or a function as torch.compile takes it.
        names: which rewrites, among the keys of `REWRITES`.

    Attributes:
        found: rewrite → how often it was made, since this was last cleared.
    """

    def __init__(self, backend: str | Callable[..., Any], names: Sequence[str]) -> None:
        self._backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        self._names = names
        self.__name__ = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
        self.found: dict[str, int] = {}

    def __call__(self, module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        """Rewrite a graph in place and compile it."""
        names = self._names
        if torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in inputs):
            names = ()  # our operators have no derivatives
        elif writes_in_place(module.graph):
            names = [name for name in names if name == "conv_layout"]  # the others compute what they find in one place
        for name, rewrite in REWRITES.items():
            count = rewrite(module.graph) if name in names else 0
            if count:
                self.found[name] = self.found.get(name, 0) + count
        if self.found:
            module.graph.lint()
            module.recompile()
        return self._backend(module, inputs, **options)
