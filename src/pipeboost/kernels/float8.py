"""Operators that quantise rows to float8_e4m3fn, with what stands before it in the same pass over memory.

Each row has a scale of its own: its largest value over the largest that float8_e4m3fn has (448). On a GPU with Triton
they are kernels of `float8_triton.py`; elsewhere the same in plain torch.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pipeboost.kernels.merge import has_triton

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
_SMALLEST = 1e-12
"""What the largest value of a row counts as at least."""
_MOST_WIDTH = 2**15
"""Columns that one pass can hold in registers."""


@torch.library.custom_op("pipeboost::quantise_rows", mutates_args=())
def quantise_rows(parts: list[torch.Tensor], gelu: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of one or two matrices side by side.

    Args:
        parts: each `(rows, width)`.
        gelu: of each part, whether its GELU (the tanh form) is taken first.

    Returns:
        `(rows, all widths)` in float8_e4m3fn, and the scales `(rows, 1)` in float32: a row is their product.
    """
    width = sum(part.shape[1] for part in parts)
    if parts[0].is_cuda and len(parts) <= 2 and width <= _MOST_WIDTH and has_triton():
        from pipeboost.kernels.float8_triton import launch_quantise_rows

        rows = parts[0].shape[0]
        out, scale = parts[0].new_empty((rows, width), dtype=FLOAT8), parts[0].new_empty((rows, 1), dtype=torch.float32)
        with torch.cuda.device_of(out):  # Triton launches on the current device, wherever the tensors are
            launch_quantise_rows([part.contiguous() for part in parts], gelu, out, scale)
        return out, scale
    taken = [F.gelu(part, approximate="tanh") if own else part for part, own in zip(parts, gelu, strict=True)]
    return to_float8(taken[0] if len(taken) == 1 else torch.cat(taken, 1))


@quantise_rows.register_fake
def _(parts, gelu):  # type: ignore[no-untyped-def]
    rows, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    return parts[0].new_empty((rows, width), dtype=FLOAT8), parts[0].new_empty((rows, 1), dtype=torch.float32)


@torch.library.custom_op("pipeboost::modulated_norm_float8", mutates_args=())
def modulated_norm_float8(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    one_plus: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `norms.modulated_norm` does, and quantise the rows of the norm.

    Returns:
        The sum, the norm `(batch * tokens, features)` in float8_e4m3fn, and its scales `(batch * tokens, 1)`.
    """
    from pipeboost.kernels.norms_triton import normalise

    with torch.cuda.device_of(x):
        return normalise(x, branch, gate, scale, shift, eps, one_plus, float8=True)  # type: ignore[return-value]


@modulated_norm_float8.register_fake
def _(x, branch, gate, scale, shift, eps, one_plus):  # type: ignore[no-untyped-def]
    rows = x.shape[0] * x.shape[1]
    total = x.new_empty(0) if branch is None else torch.empty_like(x).contiguous()
    return total, x.new_empty((rows, x.shape[2]), dtype=FLOAT8), x.new_empty((rows, 1), dtype=torch.float32)


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `quantise_rows` does for one matrix as it is, in plain torch."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp_min(_SMALLEST) / _LARGEST
    return (rows.float() * scale.reciprocal()).to(FLOAT8), scale
