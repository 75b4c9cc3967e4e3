"""Key padding: masks that say which keys are real, and how kernels that take lengths instead honour them.

No function here copies anything to the host: the number of real keys stays on the device, and the kernels take it as a
tensor of lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from pipeboost.kernels.torch_native import Attended

MaskKind = Literal["none", "key padding", "any"]


def mask_kind(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> MaskKind:
    """Return what a mask asks of a kernel, from its dtype and shape alone.

    A boolean mask of shape `(batch, keys)` or `(batch or 1, 1, 1, keys)` is key padding: it is the same for all heads
    and queries. Additive masks and masks that differ between queries are `"any"`.

    Args:
        mask: True where a key may be attended to.
        q: queries `(batch, tokens, heads, head_dim)`.
        k: keys `(batch, keys, heads, head_dim)`.
    """
    if mask is None:
        return "none"
    if mask.dtype == torch.bool:
        if mask.ndim == 2 and mask.shape[0] == q.shape[0] and mask.shape[1] == k.shape[1]:
            return "key padding"
        if mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1:
            return "key padding"
    return "any"


def valid_keys(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """Return a key-padding mask as `(batch, keys)`, True where a key is real."""
    if mask.ndim == 4:
        mask = mask[:, 0, 0, :]
    return mask.expand(batch, mask.shape[1])


def compact_keys(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, right_padded: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move the real keys and values to the front and count them.

    Attention does not depend on the order of its keys, so a kernel that reads only the first `lengths` of them computes
    the masked attention exactly. Padding may be anywhere: Qwen-Image's keys are `[text, padding, image]`.

    Args:
        k: keys `(batch, keys, heads, head_dim)`.
        v: values `(batch, keys, heads, head_dim)`.
        mask: a key-padding mask.
        right_padded: the real keys are known to be in front already, so nothing is moved.

    Returns:
        Keys and values in their new order, padding last, and `lengths`, int32 `(batch,)`.
    """
    valid = valid_keys(mask, k.shape[0])
    lengths = valid.sum(dim=1, dtype=torch.int32)
    if right_padded:
        return k, v, lengths
    order = torch.argsort(valid.to(torch.int8), dim=1, descending=True, stable=True)[:, :, None, None]
    return k.gather(1, order.expand_as(k)), v.gather(1, order.expand_as(v)), lengths


def keys_in_front(lengths: torch.Tensor, keys: int) -> torch.Tensor:
    """Return a mask `(batch, keys)`: True for the first `lengths` keys of a sample."""
    return torch.arange(keys, device=lengths.device)[None, :] < lengths[:, None]


def attend_by_lengths(
    operator: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    return_lse: bool = False,
    *,
    scale: float | None = None,
    right_padded: bool = False,
) -> Attended:
    """Run a kernel that takes key lengths: `(q, k, v, lengths or None, scale) -> output and log-sum-exp`.

    A sample without any real key gives zeros and a log-sum-exp of minus infinity.
    """
    lengths = None
    if mask is not None:
        k, v, lengths = compact_keys(k, v, mask, right_padded=right_padded)
    out, lse = operator(q, k, v, lengths, q.shape[-1] ** -0.5 if scale is None else scale)
    if not return_lse:
        return out
    return out, lse if lengths is None else torch.where((lengths > 0)[:, None, None], lse, -torch.inf)


def output_shapes(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an empty output and log-sum-exp, as an operator's fake implementation does."""
    batch, tokens, heads, _ = q.shape
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return q.new_empty(q.shape, dtype=dtype), q.new_empty((batch, heads, tokens), dtype=torch.float32)
