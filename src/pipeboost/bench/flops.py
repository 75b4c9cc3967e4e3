"""How many floating-point operations one forward takes, split into matrix products and attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


class AttentionShape(NamedTuple):
    """The shape of one attention call. What a mask hides counts as work: stock computes it."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Two matrix products: scores and values."""
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim


@dataclass(frozen=True)
class Work:
    """The floating-point operations of one forward.

    Attributes:
        gemm_flops: linears and convolutions.
        attention: how often each attention shape occurs.
    """

    gemm_flops: int
    attention: Mapping[AttentionShape, int]

    @property
    def attention_flops(self) -> int:
        """Of all attention calls together."""
        return sum(shape.flops * times for shape, times in self.attention.items())

    @property
    def flops(self) -> int:
        """All of them."""
        return self.gemm_flops + self.attention_flops

    @property
    def main_attention(self) -> AttentionShape | None:
        """The shape on which most of the attention work is spent."""
        spent = {shape: shape.flops * times for shape, times in self.attention.items()}
        return max(spent, key=lambda shape: spent[shape], default=None)


def count_work(forward: Callable[[], Any]) -> Work:
    """Count the work of `forward`, which runs stock, eager and with SDPA attention.

    It is run once, with attention left out: that is counted from its shapes, whichever kernel would have run.
    """
    counter = FlopCounterMode(display=False)
    with counter, _AttentionCounter() as attention:
        forward()
    return Work(gemm_flops=counter.get_total_flops(), attention=dict(attention.calls))


class _AttentionCounter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[AttentionShape] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._count(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _count(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        batch, heads, queries, head_dim = query.shape
        self.calls[AttentionShape(batch, heads, queries, key.shape[2], head_dim)] += 1
        return query.new_zeros(batch, heads, queries, value.shape[3])
