"""FlashAttention 2, 3, 3 in fp8, and 4, from their own packages.

Each package is called inside one operator of ours, so that torch.compile sees a single opaque node whatever the
package registers itself. Key padding becomes a tensor of lengths, which all of them take.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch

from pipeboost.kernels.key_padding import attend_by_lengths, keys_in_front, output_shapes

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
FLASH3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")


def quantize_heads(x: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to float8_e4m3fn with one scale per sample and head.

    Args:
        x: `(batch, tokens, heads, head_dim)`.
        lengths: `(batch,)`; tokens from there on are padding and become zero, so that they do not widen the scale.

    Returns:
        The fp8 tensor, and the float32 factor `(batch, heads)` that undoes the scaling.
    """
    if lengths is not None:
        x = torch.where(keys_in_front(lengths, x.shape[1])[:, :, None, None], x, 0.0)
    descale = (x.abs().amax(dim=(1, 3)).to(torch.float32) / _FP8_MAX).clamp(min=1e-12)
    scaled = x.to(torch.float32) / descale[:, None, :, None]
    return scaled.clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), descale


@torch.library.custom_op("pipeboost::flash2", mutates_args=())
def _flash2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    if lengths is None:
        out, lse, *_ = interface.flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)
    else:
        out, lse, *_ = interface.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, softmax_scale=scale, num_splits=1, return_softmax_lse=True
        )
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("pipeboost::flash3", mutates_args=())
def _flash3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Without new keys the "cache" entry is the plain forward, and in every version it can return the log-sum-exp.
    out, lse, *_ = _flash3_interface().flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=lengths,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=scale,
        num_splits=1,
        return_softmax_lse=True,
    )
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("pipeboost::flash4", mutates_args=())
def _flash4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    function = interface.flash_attn_func if lengths is None else interface.flash_attn_varlen_func
    arguments: dict[str, Any] = {"softmax_scale": scale}
    if lengths is not None:
        arguments["seqused_k"] = lengths
    if "return_lse" in inspect.signature(function).parameters:
        arguments["return_lse"] = True
    out, lse, *_ = function(q, k, v, **arguments)
    return out.contiguous(), lse.contiguous()


for _operator in (_flash2, _flash3, _flash4):
    _operator.register_fake(output_shapes)


@functools.cache
def _flash3_interface() -> Any:
    found = next(name for name in FLASH3_MODULES if importlib.util.find_spec(name) is not None)
    return importlib.import_module(found)


def _in_eight_bits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q8, q_descale = quantize_heads(q)
    k8, k_descale = quantize_heads(k, lengths)
    v8, v_descale = quantize_heads(v, lengths)
    out, lse = torch.ops.pipeboost.flash3(q8, k8, v8, lengths, scale, q_descale, k_descale, v_descale)
    return out.to(q.dtype), lse


# `Kernel.function` says what they take; all honour key-padding masks.
flash2 = functools.partial(attend_by_lengths, torch.ops.pipeboost.flash2)
"""FlashAttention 2 (`flash-attn`)."""
flash3 = functools.partial(attend_by_lengths, torch.ops.pipeboost.flash3)
"""FlashAttention 3 (`flash_attn_interface` or `fa3-fwd`)."""
flash3_fp8 = functools.partial(attend_by_lengths, _in_eight_bits)
"""FlashAttention 3 on float8_e4m3fn, quantised here with one scale per sample and head."""
flash4 = functools.partial(attend_by_lengths, torch.ops.pipeboost.flash4)
"""FlashAttention 4 (`flash_attn.cute`), for Blackwell."""
