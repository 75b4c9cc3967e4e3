"""The attention loop over SageAttention 1.x's int8 blocks, in Triton: FlashAttention's recurrence with key lengths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

QUERY_BLOCK = 128
KEY_BLOCK = 64
_LN_2 = 0.6931471805599453


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    lengths: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of quantised queries to the first `lengths` quantised keys.

    Args:
        q: int8 `(batch, tokens, heads, head_dim)`, contiguous.
        k: int8 `(batch, keys, heads, head_dim)`, contiguous.
        v: float16 values of the keys' shape, the last dimension contiguous.
        q_scale: float32 `(batch, heads, blocks of QUERY_BLOCK, 1)`, softmax scale and log2(e) included.
        k_scale: float32 `(batch, heads, blocks of KEY_BLOCK, 1)`.
        lengths: int32 `(batch,)`; a sample with none gets zeros.
        dtype: of the output.

    Returns:
        The output, and the natural log-sum-exp of the quantised scores, float32 `(batch, heads, tokens)`.
    """
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(tokens, QUERY_BLOCK), heads, batch)
    _attend[grid](
        q, k, v, q_scale, k_scale, lengths, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], tokens, k.shape[1], heads,
        HEAD_DIM=head_dim, BLOCK_M=QUERY_BLOCK, BLOCK_N=KEY_BLOCK, num_warps=4 if head_dim == 64 else 8, num_stages=3,
    )  # fmt: skip
    return out, lse * _LN_2


# Triton evaluates annotations in the kernel's scope, so its pointers and strides have none.
@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_pointer, k_pointer, v_pointer, q_scale_pointer, k_scale_pointer, lengths_pointer, out_pointer, lse_pointer,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, tokens, keys, heads,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_pointer + sample)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, HEAD_DIM)
    is_token = rows < tokens

    # The output is contiguous like the queries, so both are addressed alike.
    q_offsets = sample * q_batch + head * q_head + rows[:, None] * q_token + channels[None, :]
    q = tl.load(q_pointer + q_offsets, mask=is_token[:, None], other=0)
    q_scale = tl.load(q_scale_pointer + (sample * heads + head) * tl.cdiv(tokens, BLOCK_M) + block)
    k_block = k_pointer + sample * k_batch + head * k_head + columns[None, :] * k_token + channels[:, None]
    v_block = v_pointer + sample * v_batch + head * v_head + columns[:, None] * v_token + channels[None, :]
    k_scale_block = k_scale_pointer + (sample * heads + head) * tl.cdiv(keys, BLOCK_N)

    highest = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    for start in range(0, length, BLOCK_N):
        is_key = columns < length - start
        k = tl.load(k_block, mask=is_key[None, :], other=0)
        scores = tl.dot(q, k).to(tl.float32) * (q_scale * tl.load(k_scale_block))
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_highest[:, None])
        shrink = tl.math.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_block, mask=is_key[:, None], other=0.0)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(tl.float16), v)
        highest = new_highest
        k_block += BLOCK_N * k_token
        v_block += BLOCK_N * v_token
        k_scale_block += 1

    has_key = total > 0
    weighted = weighted / tl.where(has_key, total, 1.0)[:, None]
    tl.store(out_pointer + q_offsets, weighted.to(out_pointer.dtype.element_ty), mask=is_token[:, None])
    lse = tl.where(has_key, highest + tl.math.log2(tl.where(has_key, total, 1.0)), -float("inf"))
    tl.store(lse_pointer + (sample * heads + head) * tokens + rows, lse, mask=is_token)
