"""FlexAttention, which ships with torch: key padding as a block mask, so that blocks of padding are skipped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from pipeboost.kernels.key_padding import attend_by_lengths, keys_in_front, output_shapes

_BLOCK = 128


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    function: Any = flex_attention if q.device.type == "cpu" or torch.compiler.is_compiling() else _compiled()
    block_mask = None if lengths is None else key_padding_blocks(keys_in_front(lengths, k.shape[1]), q.shape[1])
    out, extra = function(
        *(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask, scale=scale, return_aux=AuxRequest(lse=True)
    )
    return out.transpose(1, 2).contiguous(), extra.lse.to(torch.float32)


torch.library.custom_op("pipeboost::flex", _attend, mutates_args=()).register_fake(output_shapes)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    attend = _attend if lengths is None or q.device.type == "cpu" else torch.ops.pipeboost.flex
    return attend(q, k, v, lengths, scale)


flex = functools.partial(attend_by_lengths, _flex)
"""FlexAttention; key-padding masks.

On CUDA outside torch.compile it runs through a private compiled copy, because uncompiled it would materialise all
scores; on a CPU it does materialise them. Under a mask that copy runs inside torch.compile too, within an operator of
ours: built in the same graph, with a key count that varies, torch 2.11's block masks make the kernel read wrong
addresses on an H100. The copy then has graphs of its own, one for the first key count and one for all others.
"""


def key_padding_blocks(valid: torch.Tensor, queries: int) -> BlockMask:
    """Return the block mask of a key-padding mask, made of tensor operations alone.

    Built field by field: `from_kv_blocks` would turn the table around under vmap, which an operator cannot run, and
    here every query block sees the same key blocks.

    Args:
        valid: `(batch, keys)`, True where a key is real.
        queries: number of query tokens.
    """
    batch, keys = valid.shape
    query_blocks, key_blocks = (queries + _BLOCK - 1) // _BLOCK, (keys + _BLOCK - 1) // _BLOCK
    padded = torch.nn.functional.pad(valid, (0, key_blocks * _BLOCK - keys), value=False)
    used = padded.view(batch, key_blocks, _BLOCK).any(dim=-1).to(torch.int32)
    order = torch.argsort(used, dim=-1, descending=True, stable=True).to(torch.int32)
    every_query_block = torch.arange(query_blocks, dtype=torch.int32, device=valid.device)

    def is_valid(b: torch.Tensor, h: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return valid[b, k_index]

    return BlockMask(
        seq_lengths=(queries, keys),
        kv_num_blocks=used.sum(dim=-1, dtype=torch.int32)[:, None, None].expand(batch, 1, query_blocks).contiguous(),
        kv_indices=order[:, None, None, :].expand(batch, 1, query_blocks, key_blocks).contiguous(),
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=(used * query_blocks)[:, None, :].contiguous(),
        q_indices=every_query_block.expand(batch, 1, key_blocks, query_blocks).contiguous(),
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=is_valid,
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
