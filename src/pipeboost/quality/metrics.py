"""How far apart two results are: relative error and PSNR, and the numbers that a call returned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image


def relative_error(ours: torch.Tensor, stock: torch.Tensor) -> float:
    """‖ours - stock‖ / ‖stock‖ in float64; infinite where ours is not finite."""
    ours, stock = ours.double(), stock.double()
    if not bool(torch.isfinite(ours).all()):
        return math.inf
    return float((ours - stock).norm() / stock.norm().clamp_min(1e-30))


def psnr(ours: np.ndarray, stock: np.ndarray, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal arrays. `peak` defaults to the range of `stock`."""
    error = float(np.mean((ours.astype(np.float64) - stock.astype(np.float64)) ** 2))
    if error == 0:
        return math.inf
    spread = float(stock.max() - stock.min()) if peak is None else peak
    return 10 * math.log10(spread**2 / error)


def outputs_on_host(result: Any) -> dict[str, torch.Tensor]:
    """All numbers of each output of a pipeline or a transformer in a row, copied to the host.

    Outputs go by name where they have names, else by position; what holds no numbers is left out.
    """
    if not isinstance(result, Mapping):
        outputs = result if isinstance(result, tuple) else (result,)
        result = {str(position): output for position, output in enumerate(outputs)}
    found = {name: _samples(output) for name, output in result.items()}
    rows = {name: torch.cat([each.reshape(-1) for each in samples]) for name, samples in found.items() if samples}
    return {name: row.float().cpu().clone() for name, row in rows.items()}


def _samples(output: Any) -> list[torch.Tensor]:
    """The tensors, arrays or images of one output, which may be lists of them, as tensors."""
    if isinstance(output, (list, tuple)):
        return [sample for each in output for sample in _samples(each)]
    if isinstance(output, torch.Tensor):
        return [output.detach()]
    if isinstance(output, np.ndarray):
        return [torch.from_numpy(output)] if output.dtype.kind in "fiu" else []
    if isinstance(output, Image.Image):
        return [torch.from_numpy(np.asarray(output, dtype=np.float32) / 255)]
    return []
