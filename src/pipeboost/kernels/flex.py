"""FlexAttention, which ships with torch: key padding as a block mask, so that blocks of padding are skipped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from pipeboost.kernels.key_padding import valid_keys
from pipeboost.kernels.torch_native import Attended

_BLOCK = 128


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    return_lse: bool = False,
    *,
    scale: float | None = None,
    right_padded: bool = False,
) -> Attended:
    """FlexAttention; key-padding masks. A sample without any real key gives zeros.

    On CUDA it runs through a private compiled copy, because uncompiled it would materialise all scores, and inside an
    operator of ours: compiled into a graph whose key count varies, torch 2.11's masked kernel reads wrong addresses on
    an H100. On a CPU it does materialise the scores.
    """
    valid = None if mask is None else valid_keys(mask, q.shape[0])
    attend = _attend if q.device.type == "cpu" else torch.ops.pipeboost.flex
    out, lse = attend(q, k, v, valid, q.shape[-1] ** -0.5 if scale is None else scale)
    return (out, lse) if return_lse else out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    function: Any = flex_attention if q.device.type == "cpu" else _compiled()
    block_mask = None if valid is None else key_padding_blocks(valid, q.shape[1])
    out, extra = function(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=block_mask,
        scale=scale,
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2).contiguous(), extra.lse.to(torch.float32)


_flex_operator = torch.library.custom_op("pipeboost::flex", _attend, mutates_args=())


@_flex_operator.register_fake
def _flex_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _ = q.shape
    return torch.empty_like(q).contiguous(), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def key_padding_blocks(valid: torch.Tensor, queries: int) -> BlockMask:
    """The block mask of a key-padding mask, made of tensor operations alone.

    Args:
        valid: `(batch, keys)`, True where a key is real.
        queries: number of query tokens.
    """
    batch, keys = valid.shape
    query_blocks, key_blocks = (queries + _BLOCK - 1) // _BLOCK, (keys + _BLOCK - 1) // _BLOCK
    padded = torch.nn.functional.pad(valid, (0, key_blocks * _BLOCK - keys), value=False)
    used = padded.view(batch, key_blocks, _BLOCK).any(dim=-1)
    order = torch.argsort(used.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)

    def is_valid(b: torch.Tensor, h: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return valid[b, k_index]

    return BlockMask.from_kv_blocks(
        used.sum(dim=-1, dtype=torch.int32)[:, None, None].expand(batch, 1, query_blocks).contiguous(),
        order[:, None, None, :].expand(batch, 1, query_blocks, key_blocks).contiguous(),
        BLOCK_SIZE=_BLOCK,
        mask_mod=is_valid,
        seq_lengths=(queries, keys),
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
