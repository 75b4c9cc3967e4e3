"""SageAttention: queries and keys in int8, from the package `sageattention`, versions 1.x and 2.x."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

import torch

from pipeboost.kernels.key_padding import attend_by_lengths, keys_in_front, output_shapes

_LAYOUT = "NHD"


@torch.library.custom_op("pipeboost::sage", mutates_args=())
def _sage(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    version = _version_1 if int(importlib.metadata.version("sageattention").split(".")[0]) < 2 else _version_2
    return version(q, k, v, lengths, scale)


_sage.register_fake(output_shapes)
sage = functools.partial(attend_by_lengths, torch.ops.pipeboost.sage)
"""SageAttention with smoothed keys; key-padding masks.

The key sequence may have any length. 1.x's own loop counts the keys that are missing from the last block of 64 as keys
of score zero, so with 1.x only its quantiser is used, and the loop is `sage_loop`. 2.x takes no lengths: each sample is
cut to its own, which waits for the device.
"""


def _version_1(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from sageattention.quant_per_block import per_block_int8

    from pipeboost.kernels.sage_loop import KEY_BLOCK, QUERY_BLOCK, int8_attention

    if lengths is None:
        lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    real = keys_in_front(lengths, k.shape[1])[:, :, None, None]
    total = torch.where(real, k, 0.0).sum(dim=1, keepdim=True, dtype=torch.float32)
    mean = total / lengths.clamp(min=1)[:, None, None, None]
    smooth = torch.where(real, k - mean, 0.0).to(k.dtype)
    q_int8, q_scale, k_int8, k_scale = per_block_int8(
        q.contiguous(), smooth, BLKQ=QUERY_BLOCK, BLKK=KEY_BLOCK, sm_scale=scale, tensor_layout=_LAYOUT
    )
    out, lse = int8_attention(q_int8, k_int8, v.to(torch.float16), q_scale, k_scale, lengths, q.dtype)
    shift = torch.einsum("bqhd,bkhd->bhq", q.to(torch.float32), mean) * scale
    return out, lse + shift


def _version_2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    sageattn = importlib.import_module("sageattention").sageattn
    q, k, v = (x.contiguous() for x in (q, k, v))
    if lengths is None:
        out, lse = sageattn(q, k, v, tensor_layout=_LAYOUT, sm_scale=scale, return_lse=True)
        return out.contiguous(), lse.contiguous()
    batch, tokens, heads, _ = q.shape
    out = torch.zeros_like(q)
    lse = q.new_full((batch, heads, tokens), -torch.inf, dtype=torch.float32)
    for sample, length in enumerate(lengths.tolist()):
        if length:
            one = (slice(sample, sample + 1), slice(length))
            out[sample], lse[sample] = (
                x[0]
                for x in sageattn(q[one[0]], k[one], v[one], tensor_layout=_LAYOUT, sm_scale=scale, return_lse=True)
            )
    return out, lse
