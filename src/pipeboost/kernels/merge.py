"""Two partial attentions as one: their outputs weighed by the log-sum-exp of the scores of each."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch


def merge_partial(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention to two parts of the keys into attention to all of them.

    Where all keys of a part are masked its log-sum-exp is -inf, and what it computed may be anything.

    Args:
        out: of one part, float32 `(batch, tokens, heads, head_dim)`, contiguous; on a GPU the result is written there.
        lse: float32 `(batch, heads, tokens)`; on a GPU the result is written there.
        part: of the other one, in any dtype.
        part_lse: like `lse`.
    """
    if out.device.type == "cuda" and out.is_contiguous() and lse.is_contiguous() and has_triton():
        from pipeboost.kernels.merge_triton import merge_in_place

        with torch.cuda.device_of(out):  # Triton launches on the current device, wherever the tensors are
            merge_in_place(out, lse, part.contiguous(), part_lse.contiguous())
        return out, lse
    whole = torch.logaddexp(lse, part_lse)
    weight = torch.exp(lse - whole).nan_to_num(0.0).transpose(1, 2).unsqueeze(-1)
    part_weight = torch.exp(part_lse - whole).nan_to_num(0.0).transpose(1, 2).unsqueeze(-1)
    merged = torch.where(weight > 0, out * weight, 0.0) + torch.where(part_weight > 0, part.float() * part_weight, 0.0)
    return merged, whole


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
