"""The two rates that bound a forward, measured here: of a large matrix product, and of the best attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from pipeboost.bench.flops import AttentionShape, Work
from pipeboost.core.hardware import detect_hardware
from pipeboost.kernels.table import KERNELS, as_installed, refuses, unavailable_reason
from pipeboost.quality.timing import time_runs

_KERNELS = ("sdpa", "cudnn", "flash2", "flash3", "flash4")
_REPEATS = 10


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
