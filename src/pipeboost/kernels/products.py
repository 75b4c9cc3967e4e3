"""An operator that multiplies what would be concatenated part by part, and adds the products up in place."""

from __future__ import annotations

import torch


@torch.library.custom_op("pipeboost::linear_of_parts", mutates_args=())
def linear_of_parts(parts: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `cat(parts, -1) @ weight.T + bias` without the concatenation.

    Args:
        parts: each `(rows, width)`, contiguous; the sum of the widths is `in_features`.
        weight: `(out_features, in_features)`.
        bias: `(out_features,)`.
    """
    columns = weight.split([part.shape[1] for part in parts], dim=1)
    total = torch.addmm(bias, parts[0], columns[0].t())
    for part, own in zip(parts[1:], columns[1:], strict=True):
        total.addmm_(part, own.t())
    return total


@linear_of_parts.register_fake
def _(parts, weight, bias):  # type: ignore[no-untyped-def]
    return parts[0].new_empty((parts[0].shape[0], weight.shape[0]))
