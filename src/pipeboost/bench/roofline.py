"""The two rates that bound a forward, measured here: of a large matrix product, and of the best attention kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeboost.bench.flops import AttentionShape, Work
from pipeboost.quality.timing import time_runs

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """Measured rates in FLOP/s.

    Attributes:
        gemm: of a square matrix product of `gemm_size`, random data.
        gemm_size: its side.
        attention: of the fastest kernel at the model's main attention shape, without a mask.
        attention_kernel: its name.
    """

    gemm: float
    gemm_size: int
    attention: float
    attention_kernel: str

    def bound_ms(self, work: Work) -> float:
        """The time in which `work` would be done with every operation at its ceiling, and nothing else to do."""
        return (work.gemm_flops / self.gemm + work.attention_flops / self.attention) * 1e3


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
    """Name and median milliseconds of the fastest kernel that runs."""
    times: dict[str, float] = {}
    failures = []
    for name, (attention, heads_dim) in _kernels(device).items():
        tensors = [
            torch.randn(shape.batch, shape.heads, tokens, shape.head_dim, device=device, dtype=dtype)
            .transpose(1, heads_dim)
            .contiguous()
            for tokens in (shape.queries, shape.keys, shape.keys)
        ]
        try:
            timing, _ = time_runs(partial(attention, *tensors), device, repeats=_REPEATS)
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
            continue
        times[name] = timing.median
    if not times:
        raise RuntimeError(f"no attention kernel runs at {shape}: {'; '.join(failures)}")
    fastest = min(times, key=lambda name: times[name])
    return fastest, times[fastest]


def _kernels(device: torch.device) -> dict[str, tuple[Attention, int]]:
    """Kernels by name, each with the dimension of heads in the tensors that it takes."""
    kernels: dict[str, tuple[Attention, int]] = {"sdpa": (F.scaled_dot_product_attention, 1)}
    if device.type == "cuda":
        kernels["sdpa-cudnn"] = (partial(_sdpa, SDPBackend.CUDNN_ATTENTION), 1)
        kernels["sdpa-flash"] = (partial(_sdpa, SDPBackend.FLASH_ATTENTION), 1)
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        if hopper and importlib.util.find_spec("fa3_fwd_interface") is not None:
            from fa3_fwd_interface import flash_attn_func

            kernels["flash3"] = (flash_attn_func, 2)
    return kernels


def _sdpa(backend: SDPBackend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value)
