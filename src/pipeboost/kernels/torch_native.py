"""The kernels that come with torch: `scaled_dot_product_attention` as Diffusers calls it, and cuDNN on its own.

Queries, keys and values are `(batch, tokens, heads, head_dim)`; a log-sum-exp is natural, float32,
`(batch, heads, tokens)`, and minus infinity where a query has no key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_BIAS_ALIGNMENT = 16


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    return_lse: bool = False,
    *,
    scale: float | None = None,
    right_padded: bool = False,
) -> Attended:
    """torch's own choice of kernel, called exactly as Diffusers' `native` backend does; takes any mask.

    A query without any key gives zeros. With `return_lse` the kernel behind it is called by name, because the public
    function does not return the log-sum-exp.
    """
    if mask is not None and mask.ndim == 2 and mask.shape[0] == q.shape[0] and mask.shape[1] == k.shape[1]:
        mask = mask.unsqueeze(1).unsqueeze(1)
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    if not return_lse:
        return F.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale
        ).permute(0, 2, 1, 3)
    bias = None if mask is None else _additive(mask, q, k)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
    elif mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    else:
        bias = None if bias is None else bias.expand(-1, q.shape[1], -1, -1)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse, *_ = efficient(q, k, v, bias, True, 0.0, False, scale=scale)
        lse = lse[..., : q.shape[2]]
    lse = lse.to(torch.float32)
    if mask is not None:
        has_key = _has_key(mask)
        out, lse = torch.where(has_key.unsqueeze(-1), out, 0.0), torch.where(has_key, lse, -torch.inf)
    return out.permute(0, 2, 1, 3), lse


def cudnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    return_lse: bool = False,
    *,
    scale: float | None = None,
    right_padded: bool = False,
) -> Attended:
    """cuDNN's fused attention, by name; CUDA only, half precision only, any mask.

    The operator returns wrong results for inputs that are not contiguous, so it gets copies where needed. It has no
    kernel for a single query or key, which `sdpa` then serves. A query without any key gives zeros.
    """
    if q.shape[1] == 1 or k.shape[1] == 1:
        return sdpa(q, k, v, mask, return_lse, scale=scale)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None if mask is None else _additive(mask, q, k), return_lse, 0.0, False, False, scale=scale
    )
    has_key = None if mask is None else _has_key(mask)
    if has_key is not None:
        out = torch.where(has_key.unsqueeze(-1), out, 0.0)
    out = out.transpose(1, 2)
    if not return_lse:
        return out
    # torch 2.9 and later return (batch, heads, tokens, 1), earlier ones (batch, heads, tokens).
    lse = lse.reshape(q.shape[:3])
    return out, lse if has_key is None else torch.where(has_key, lse, -torch.inf)


def _has_key(mask: torch.Tensor) -> torch.Tensor:
    """Whether a query has a key at all: `(batch, heads or 1, tokens or 1)`."""
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    return allowed.any(dim=-1)


def _additive(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return a mask as bias `(batch, heads or 1, tokens, keys)` of the queries' dtype, rows aligned as kernels need."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    mask = mask.to(q.dtype)[(None,) * (4 - mask.ndim)]
    keys = k.shape[-2]
    mask = F.pad(mask.expand(*mask.shape[:3], keys), (0, -keys % _BIAS_ALIGNMENT))[..., :keys]
    return mask.expand(q.shape[0], mask.shape[1], q.shape[2], keys)
