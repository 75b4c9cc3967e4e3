"""What bounds a forward: its floating-point operations, and two rates measured here.

The operations are split into matrix products and attention; the rates are those of a large matrix product and of the
best attention kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pipeboost.core.hardware import detect_hardware
from pipeboost.kernels.table import KERNELS, as_installed, refuses, unavailable_reason
from pipeboost.quality.timing import time_runs

_KERNELS = ("sdpa", "cudnn", "flash2", "flash3", "flash4")
_REPEATS = 10


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


@dataclass(frozen=True)
class Ceilings:
    """Measured rates in FLOP/s.

    Attributes:
        gemm_ceiling: of a square matrix product, random data.
        gemm_ceiling_size: its side.
        attention_ceiling: of the fastest kernel at the model's main attention shape, without a mask.
        attention_ceiling_kernel: its name.
    """

    gemm_ceiling: float
    gemm_ceiling_size: int
    attention_ceiling: float
    attention_ceiling_kernel: str

    def bound_ms(self, work: Work) -> float:
        """Return the time in which `work` would be done with every operation at its ceiling, and nothing else to do."""
        return (work.gemm_flops / self.gemm_ceiling + work.attention_flops / self.attention_ceiling) * 1e3


def measure_ceilings(work: Work, *, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both ceilings in the model's own dtype."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing, _ = time_runs(lambda: left @ right, device, repeats=_REPEATS)
    gemm = 2 * size**3 / (timing.median / 1e3)
    shape = work.main_attention
    if shape is None:
        return Ceilings(gemm, size, gemm, "none")
    kernel, milliseconds = _fastest_attention(shape, device=device, dtype=dtype)
    return Ceilings(gemm, size, shape.flops / (milliseconds / 1e3), kernel)


def _fastest_attention(shape: AttentionShape, *, device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """Return name and median milliseconds of the fastest kernel that runs."""
    times: dict[str, float] = {}
    failures, hardware = [], detect_hardware(device)
    query, key, value = (
        torch.randn(shape.batch, tokens, shape.heads, shape.head_dim, device=device, dtype=dtype)
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    for name in _KERNELS:
        kernel = as_installed(KERNELS[name])
        if unavailable_reason(kernel, hardware) or refuses(
            kernel, device=device.type, dtype=dtype, head_dim=shape.head_dim, mask="none"
        ):
            continue
        try:
            timing, _ = time_runs(partial(kernel.function, query, key, value), device, repeats=_REPEATS)
            times[name] = timing.median
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
    if not times:
        raise RuntimeError(f"no attention kernel runs at {shape}: {'; '.join(failures)}")
    fastest = min(times, key=lambda name: times[name])
    return fastest, times[fastest]
