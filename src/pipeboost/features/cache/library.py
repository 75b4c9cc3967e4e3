"""cache-dit, imported quietly, and the few of its parts that we put together ourselves.

Import this module only where a cache is attached: cache-dit takes a while and has an opinion on logging.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from pipeboost.core.config import CacheConfig
from pipeboost.core.families import BlockReturn
from pipeboost.distributed import Group
from pipeboost.features.cache.steps import LONGEST

_LEFT_BEHIND = "FFPA_CUDA_ALLOW_SMALL_D"


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Undo what importing cache-dit does: it replaces two methods of `logging.Logger` and sets a variable."""
    names = ("warning_once", "info_once")
    methods = {name: vars(logging.Logger)[name] for name in names if name in vars(logging.Logger)}
    variable = os.environ.get(_LEFT_BEHIND)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(logging.Logger, name, method)
        if variable is None:
            os.environ.pop(_LEFT_BEHIND, None)


with _process_kept():
    from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
    from cache_dit.caching import CachedBlocks, CachedContextManager
    from cache_dit.caching.cache_blocks import pattern_base

__all__ = ["BlockRow", "Cache"]

Cache: TypeAlias = Callable[..., tuple[Any, bool]]
"""Runs a row of blocks for one step: what its last block would have returned, and whether the middle was skipped."""
_PATTERNS: dict[BlockReturn, ForwardPattern] = {
    "image_text": ForwardPattern.Pattern_0,
    "text_image": ForwardPattern.Pattern_1,
    "image": ForwardPattern.Pattern_2,
}
_CONTEXT = "branch"


class _Contexts(CachedContextManager):
    """cache-dit's contexts, whose decision is that of the ranks that share the tokens.

    cache-dit averages the residual over the whole world as soon as there are several ranks, also those that work on
    other samples or on another guidance branch.
    """

    def __init__(self, name: str, tokens: Group | None = None) -> None:
        super().__init__(name=name)
        self._tokens = tokens

    def similarity(
        self,
        t1: torch.Tensor,
        t2: torch.Tensor,
        *,
        threshold: float,
        parallelized: bool = False,
        **options: Any,
    ) -> bool:
        shared = self._tokens is not None and self._tokens.size > 1
        if not shared or not 0 < threshold < 1 or t1.shape != t2.shape:
            return bool(super().similarity(t1, t2, threshold=threshold, parallelized=False, **options))
        assert self._tokens is not None
        # Ranks may have one token more or less, so sums and not means are added up.
        sums = torch.stack([(t1 - t2).abs().sum(dtype=torch.float32), t1.abs().sum(dtype=torch.float32)])
        difference, size = self._tokens.all_reduce(sums).tolist()
        self.add_residual_diff(difference / size)
        return bool(difference / size < threshold)


class BlockRow:
    """cache-dit's wrapper for a row of blocks of one form, still without blocks and context."""

    def __init__(self, name: str, returns: BlockReturn) -> None:
        self._pattern = _PATTERNS[returns]
        with _constructor_log_off():
            self._wrapper = CachedBlocks(
                nn.ModuleList(),
                transformer=nn.Module(),
                forward_pattern=self._pattern,
                cache_prefix=name,
                cache_context=_CONTEXT,
                context_manager=_Contexts(name=name),
            )

    def fits(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether all blocks take and return their states in the form of this row."""
        return bool(BlockAdapter.match_blocks_pattern(nn.ModuleList(blocks), self._pattern, logging=False))

    def cache(
        self,
        blocks: Sequence[nn.Module],
        settings: CacheConfig,
        *,
        steps: int | None,
        mask: list[int] | None,
        tokens: Group | None = None,
    ) -> Cache:
        """A cache with a fresh context over these blocks; `tokens` are the ranks that share them."""
        contexts = _Contexts(name=self._wrapper.cache_prefix, tokens=tokens)
        contexts.new_context(
            name=_CONTEXT,
            cache_config=DBCacheConfig(
                Fn_compute_blocks=settings.fn,
                Bn_compute_blocks=settings.bn,
                residual_diff_threshold=settings.threshold,
                max_warmup_steps=settings.warmup,
                max_continuous_cached_steps=settings.max_continuous or LONGEST,
                enable_separate_cfg=False,
                num_inference_steps=steps,
                steps_computation_mask=mask,
                steps_computation_policy=settings.policy,
            ),
            calibrator_config=None
            if settings.taylorseer_order is None
            else TaylorSeerCalibratorConfig(taylorseer_order=settings.taylorseer_order),
        )
        wrapper = copy.copy(self._wrapper)
        wrapper._modules = {"transformer_blocks": nn.ModuleList(blocks)}
        wrapper.transformer = None
        wrapper.context_manager = contexts

        def run(*args: Any, **kwargs: Any) -> tuple[Any, bool]:
            output = wrapper(*args, **kwargs)
            context = contexts.get_context(_CONTEXT)
            return output, context.get_current_step() in context.get_cached_steps()

        return run


@contextlib.contextmanager
def _constructor_log_off() -> Iterator[None]:
    """Suppress the line that cache-dit logs for every wrapper."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    pattern_base.logger.addFilter(refuse)
    try:
        yield
    finally:
        pattern_base.logger.removeFilter(refuse)
