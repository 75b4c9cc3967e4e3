"""`attach_cache`: checks everything, then adds one middleware to each repeated block of one transformer.

cache-dit's own `enable_cache` is not used: it replaces the transformer's `forward` and block lists, marks a class of
its own, and may choose another attention backend. Its parts are: the blocks wrapper (`CachedBlocks`, which decides and
extrapolates), its forward patterns, contexts, calibrators and step masks. They are put together per call, so the model
itself is never changed and calls in several threads have nothing in common.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Blocks, Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.features.cache.output import CachedOutput
from pipeboost.features.cache.span import CachedSpan
from pipeboost.features.cache.steps import settings_of

_OTHERS = ("_cache", "_attention_broadcast")
"""How the modules of Diffusers are called whose hooks skip what a block or its attention computes."""


def attach_cache(
    model: nn.Module, settings: CacheConfig, family: Family, ledger: Ledger, *, owner: object, position: int = 0
) -> None:
    """Cache one transformer in the calls of `owner`; in all others, and outside calls, it stays stock.

    The state of a cache lives in the call: one context per guidance branch and expert, made at the call's first
    forward and dropped with the call. What was computed and skipped can be read from `call[CACHE]`, a `CallCache`. The
    call's `step` and `branch` must be kept up by middleware on the scheduler and the transformer.

    A `step_mask` fixes the computed steps, so `threshold` and `warmup` have no say then, unless its policy is
    `"dynamic"`.

    Args:
        model: the transformer; its block lists stay the attributes they are, so `compile_model` may come later.
        settings: for the first expert; `settings.secondary`, if given, for the others.
        owner: the acceleration, which is the `owner` of its calls. Several may cache one model, each its own way.
        position: which of `family.denoisers` this model is.

    With `extrapolate="output"` the whole transformer is skipped, and the family need not say which blocks there are.

    Raises:
        UnsupportedError: the family does not say which blocks there are, the blocks are not of the form it
            declares, or another cache is on the model. Nothing was changed.
        ConfigurationError: `fn + bn` is more than the blocks there are. Nothing was changed.
    """
    if settings.extrapolate == "output":
        refuse_other_caches(model, family)
        middleware = CachedOutput(settings=settings, family=family, position=position, owner=owner)
        ledger.add_middleware(model, "__call__", middleware, place="component.cache")
        return
    if not family.blocks:
        raise UnsupportedError(
            f"cache is not possible for {stock_class(model).__name__}: no family says which blocks may be skipped; "
            "use cache=None or add a family (entry-point group 'pipeboost.patches')"
        )
    own = settings_of(settings, position)
    spans = [
        CachedSpan(model, row, settings=settings, family=family, position=position, owner=owner)
        for row in _rows(model, family)
    ]
    refuse_other_caches(model, family)
    for span in spans:
        _check(model, span, own)
    for span in spans:
        for block in span.blocks:
            ledger.add_middleware(block, "__call__", span, place="block.cache")


def _rows(model: nn.Module, family: Family) -> list[tuple[Blocks, ...]]:
    rows: list[tuple[Blocks, ...]] = []
    for blocks in family.blocks:
        try:
            empty = len(operator.attrgetter(blocks.path)(model)) == 0
        except AttributeError as error:
            raise UnsupportedError(
                f"{stock_class(model).__name__} has no blocks where family {family.name!r} expects them ({error}); "
                "use cache=None"
            ) from error
        if empty:
            continue
        if blocks.cached_with_previous and rows:
            rows[-1] = (*rows[-1], blocks)
        else:
            rows.append((blocks,))
    return rows


def _check(model: nn.Module, span: CachedSpan, own: CacheConfig) -> None:
    name, count = stock_class(model).__name__, len(span.blocks)
    if own.fn + own.bn > count:
        raise ConfigurationError(
            f"cache.fn={own.fn} and cache.bn={own.bn} are more than the {count} blocks in {name}.{span.name}; "
            f"use fn + bn of at most {count}"
        )
    if not span.fits:
        raise UnsupportedError(
            f"cache is not possible for {name}: the blocks in {span.name} do not take and return their states as the "
            "family declares; use cache=None"
        )


def refuse_other_caches(model: nn.Module, family: Family) -> None:
    """Refuse a transformer on which a cache of Diffusers or cache-dit is, also one put on it since; asked at each call.

    Raises:
        UnsupportedError: two caches would skip and extrapolate on top of each other.
    """
    name = stock_class(model).__name__
    if getattr(model, "is_cache_enabled", False) or any(map(_caches, _hooked(model, family))):
        raise UnsupportedError(
            f"a cache of Diffusers is on this {name}; take it off with its disable_cache(), or use cache=None"
        )
    if "_is_cached" in vars(model):
        raise UnsupportedError(
            f"cache-dit is on this {name}; take it off with cache_dit.disable_cache(), or use cache=None"
        )


def _hooked(model: nn.Module, family: Family) -> list[nn.Module]:
    """Return the model, its blocks and their children that have hooks of Diffusers, where its caches put theirs."""
    blocks = [block for row in family.blocks for block in operator.attrgetter(row.path)(model)]
    parts = [model, *blocks, *(part for block in blocks for part in block._modules.values() if part is not None)]
    return [part for part in parts if "_diffusers_hook" in part.__dict__]


def _caches(module: nn.Module) -> bool:
    registry: Any = module._diffusers_hook
    return any(type(hook).__module__.endswith(_OTHERS) for hook in registry.hooks.values())
