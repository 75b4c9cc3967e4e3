"""Padded text: cut it to the longest prompt of the batch, and drop the mask where no padding is left.

HunyuanVideo pads every prompt to one length and hands each block a mask over image and text, which keeps kernels
without masks away. Image tokens never see a padded text token, and what happens to padded tokens is thrown away, so
cutting them changes no output but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.families import Family, PaddedText
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import signature_of, stock_class

_UNMASKED = "padded text without a mask"
_REMEMBERED = 8


class _Text(NamedTuple):
    """What a text mask says: how many tokens to keep, whether all of those are real, and the mask itself, kept alive
    so that its memory is not given to another one."""

    kept: int
    full: bool
    mask: torch.Tensor


_TEXTS = Slot[dict[Any, _Text]](dict)


def trim_padded_text(model: torch.nn.Module, family: Family, ledger: Ledger, *, at_least: int = 1) -> None:
    """Trim padded text inside our pipeline calls; does nothing for a family without any.

    Only trailing padding is cut. Where the batch's prompts then still differ in length, or a mask has holes, the blocks
    keep their mask. Once per call and mask the lengths are read back from the device.

    Args:
        model: the transformer; pipelines that share it share the change.
        family: its family.
        ledger: takes the inverse.
        at_least: text tokens to keep, where ranks share them and none may be without.
    """
    if family.padded_text is None:
        return
    padded, paths = family.padded_text, [blocks.path for blocks in family.blocks]

    def apply(inner: Ledger) -> None:
        unmasked = _unmask_blocks(padded.block_mask, id(model))
        inner.add_middleware(model, "__call__", _trim_text(padded, id(model), at_least), place="component.padding")
        for path in paths:
            for block in getattr(model, path):
                inner.add_middleware(block, "__call__", unmasked, place="block.padding")

    ledger.share(model, "padded text", (padded, at_least), apply)


def _trim_text(padded: PaddedText, key: int, at_least: int) -> Callable[..., Any]:
    def trim_text(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if torch.compiler.is_compiling() or call is None or not call.has("attention"):
            return call_next(*args, **kwargs)
        bound = signature_of(stock_class(owner), "forward").bind(owner, *args, **kwargs)
        embeds, mask = bound.arguments.get(padded.embeds), bound.arguments.get(padded.mask)
        if embeds is None or mask is None or mask.ndim != 2 or mask.shape[1] != embeds.shape[1]:
            return call_next(*args, **kwargs)
        text = _read(mask, call, at_least)
        if text.kept < mask.shape[1]:
            bound.arguments[padded.embeds] = embeds[:, : text.kept]
            bound.arguments[padded.mask] = mask[:, : text.kept]
        args, kwargs = bound.args[1:], bound.kwargs
        if not text.full:
            return call_next(*args, **kwargs)
        call.decided.add((_UNMASKED, key))
        try:
            return call_next(*args, **kwargs)
        finally:
            call.decided.discard((_UNMASKED, key))

    return trim_text


def _unmask_blocks(block_mask: str, key: int) -> Callable[..., Any]:
    def unmask_block(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        # A transformer compiled as a whole traces its blocks, where no context variable may be read: the mask stays.
        call = None if torch.compiler.is_compiling() else current_call()
        if call is None or (_UNMASKED, key) not in call.decided:
            return call_next(*args, **kwargs)
        if block_mask in kwargs:
            return call_next(*args, **{**kwargs, block_mask: None})
        position = list(signature_of(stock_class(owner), "forward").parameters).index(block_mask) - 1
        return call_next(*args[:position], None, *args[position + 1 :], **kwargs)

    return unmask_block


def _read(mask: torch.Tensor, call: Call, at_least: int) -> _Text:
    """Read a mask, once for a tensor and its version; a view of the same memory is the same mask."""
    known = call[_TEXTS]
    # Tensors made in inference mode count no versions; pipelines do not write to a mask after making it.
    version = 0 if mask.is_inference() else mask._version
    identity = (mask.data_ptr(), mask.device, mask.dtype, tuple(mask.shape), mask.stride(), version)
    if identity not in known:
        real = mask.ne(0).cpu()
        columns = real.any(dim=0).nonzero()
        last = int(columns[-1]) + 1 if len(columns) else 1
        kept = min(max(last, at_least), mask.shape[1])
        if len(known) >= _REMEMBERED:
            known.pop(next(iter(known)))
        known[identity] = _Text(kept, bool(real[:, :kept].all()), mask)
    return known[identity]
