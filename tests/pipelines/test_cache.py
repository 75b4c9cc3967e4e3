"""Step caching on stock pipelines: what it skips, what it leaves alone, and that a call owns its cache."""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import cache_dit
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from pipeboost import accelerate_pipeline
from pipeboost.contract.call import Call, current_call, open_call
from pipeboost.contract.registry import family_of
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.features.cache import CacheCount, attach_cache
from pipeboost.features.cache.state import CACHE
from tests.moments import at_once
from tests.pipelines.tiny import NEGATIVE_PROMPT, OTHER_PROMPT, TINY

FAMILIES = ("flux_true_cfg", "qwen_image", "wan22_t2v", "hunyuan_video")
CACHED = ("flux", "qwen_image", "wan", "hunyuan_video", "hunyuan_video_15")
EVERY_OTHER = CacheConfig(step_mask=([1, 1, 1, 1, 1], [1, 1, 1, 1, 1]))
ONE_IN_TWO = CacheConfig(threshold=1.0, warmup=1, max_continuous=1)
NEVER = CacheConfig(threshold=1e-9)


class Acceleration:
    """Stands in for the real one: opens calls, counts steps and branches, and caches every denoiser."""

    def __init__(self, pipe: DiffusionPipeline, settings: CacheConfig) -> None:
        self.calls: list[Call] = []
        self.ledger = Ledger()
        family = family_of(pipe)
        with self.ledger:
            for name, model in family.models(pipe).items():
                position = family.denoisers.index(name)
                attach_cache(model, settings, family, self.ledger, owner=self, position=position)
                self.ledger.add_middleware(model, "__call__", self._denoise, place="component.stages")
            self.ledger.add_middleware(pipe, "__call__", self._run, place="component.stages")
            self.ledger.add_middleware(pipe.scheduler, "step", self._advance, place="component.stages")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Acceleration":
        return self

    def counts(self) -> tuple[CacheCount, ...]:
        return self.calls[-1][CACHE].counts()

    def _run(self, call_next: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(stock_class(pipe).__call__).bind(pipe, *args, **kwargs)
        with open_call(pipe, owner=self, arguments=dict(bound.arguments)) as call:
            self.calls.append(call)
            return call_next(*args, **kwargs)

    def _denoise(self, call_next: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is not None and call.owner is self:
            call.branch += 1
        return call_next(*args, **kwargs)

    def _advance(self, call_next: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = call_next(*args, **kwargs)
        call = current_call()
        if call is not None and call.owner is self:
            call.step, call.branch = call.step + 1, -1
        return result


@contextlib.contextmanager
def cached(pipe: DiffusionPipeline, settings: CacheConfig) -> Iterator[Acceleration]:
    acceleration = Acceleration(pipe, settings)
    try:
        yield acceleration
    finally:
        acceleration.ledger.undo()


def cached_call(name: str, settings: CacheConfig, **call: Any) -> torch.Tensor:
    """The output of one call of a pipeline built and cached for it alone."""
    pipe = TINY[name].build()
    with cached(pipe, settings):
        return TINY[name].call(pipe, **call)


def rows(pipe: DiffusionPipeline) -> Iterator[tuple[str, str, Any]]:
    family = family_of(pipe)
    for name, model in family.models(pipe).items():
        for blocks in family.blocks:
            yield name, blocks.path, getattr(model, blocks.path)


@contextlib.contextmanager
def counted(block: torch.nn.Module) -> Iterator[list[None]]:
    """Grows by one entry with every forward of the block."""
    runs: list[None] = []
    hook = block.register_forward_hook(lambda *_: runs.append(None))
    try:
        yield runs
    finally:
        hook.remove()


@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].family in CACHED and name != "flux_controlnet"])
def test_a_cache_that_never_skips_is_bit_identical_to_stock(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    stock = entry.call(pipe)
    with cached(pipe, NEVER) as acceleration:
        assert torch.equal(entry.call(pipe), stock)
        counts = acceleration.counts()
    assert {count.branch for count in counts} == set(range(entry.branches))
    assert all(count.cached_steps == 0 and count.computed_steps > 0 for count in counts)


@pytest.mark.parametrize("name", FAMILIES)
def test_undone_or_outside_its_calls_a_cached_model_is_bit_identical_to_stock(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    sharing = type(pipe)(**pipe.components, **{k: v for k, v in pipe.config.items() if k == "boundary_ratio"})
    sharing.set_progress_bar_config(disable=True)
    stock = entry.call(pipe, steps=4)
    with cached(pipe, EVERY_OTHER):
        assert not torch.equal(entry.call(pipe, steps=4), stock)
        assert torch.equal(entry.call(sharing, steps=4), stock)
    assert torch.equal(entry.call(pipe, steps=4), stock)


@pytest.mark.parametrize("name", FAMILIES)
def test_skipped_steps_run_the_first_blocks_only(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    with contextlib.ExitStack() as stack, cached(pipe, EVERY_OTHER) as acceleration:
        first, last = {}, {}
        for denoiser, path, blocks in rows(pipe):
            first[denoiser, path] = stack.enter_context(counted(blocks[0]))
            last[denoiser, path] = stack.enter_context(counted(blocks[-1]))
        entry.call(pipe, steps=6)
        counts = acceleration.counts()
    for denoiser in {count.denoiser for count in counts}:
        for row in {count.blocks for count in counts}:
            mine = [count for count in counts if (count.denoiser, count.blocks) == (denoiser, row)]
            assert {count.branch for count in mine} == set(range(entry.branches))
            assert sum(count.cached_steps for count in mine) > 0
            head, tail = row.split("+")[0], row.split("+")[-1]
            assert len(first[denoiser, head]) == sum(len(count.skipped) for count in mine)
            assert len(last[denoiser, tail]) == sum(count.computed_steps for count in mine)


def test_a_layer_that_compile_hangs_on_a_block_later_sees_the_computed_steps_only() -> None:
    pipe = TINY["flux_dev"].build()
    seen: list[str] = []

    def compiled(call_next: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(block).__name__)
        return call_next(*args, **kwargs)

    with cached(pipe, EVERY_OTHER) as acceleration:
        for _, _, blocks in rows(pipe):
            for block in blocks:
                acceleration.ledger.add_middleware(block, "__call__", compiled, place="block.compile")
        TINY["flux_dev"].call(pipe, steps=4)
    # Of 3 and 4 blocks, two steps ran all and two the first alone.
    assert (seen.count("FluxTransformerBlock"), seen.count("FluxSingleTransformerBlock")) == (2 * 3 + 2 * 1, 2 * 4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("taylorseer", [None, 1])
def test_the_result_is_that_of_cache_dit_on_the_bare_transformer(
    name: str, taylorseer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also shows that each guidance branch has a cache of its own: cache-dit is told to keep them apart."""
    # enable_cache marks its placeholder class and would choose an attention backend.
    monkeypatch.setattr(cache_dit.caching.FakeDiffusionPipeline, "_is_cached", False, raising=False)
    monkeypatch.setattr(cache_dit.caching.cache_interface.AttnBackendSelector, "auto_select", lambda *_: None)
    entry, steps, settings = TINY[name], 9, CacheConfig(threshold=0.7, warmup=2, taylorseer_order=taylorseer)
    ours = cached_call(name, settings, steps=steps)
    pipe = entry.build()
    for model in family_of(pipe).models(pipe).values():
        cache_dit.enable_cache(
            model,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                residual_diff_threshold=0.7,
                max_warmup_steps=2,
                max_continuous_cached_steps=3,
                enable_separate_cfg=entry.branches == 2,
            ),
            calibrator_config=taylorseer and cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylorseer),
        )
    theirs = entry.call(pipe, steps=steps)
    skipped = [model._cached_steps for model in family_of(pipe).models(pipe).values()]
    assert any(skipped), "no step was skipped, so nothing was compared"
    assert torch.equal(ours, theirs)


def test_every_call_starts_afresh_whatever_came_before() -> None:
    entry = TINY["flux_dev"]
    requests: list[dict[str, Any]] = [
        {"steps": 28},
        {"steps": 12},
        {"steps": 28},
        {"steps": 6, "height": 96, "width": 64, "prompt": OTHER_PROMPT},
        {"steps": 6, "negative_prompt": NEGATIVE_PROMPT, "true_cfg_scale": 3.0},
        {"steps": 12},
    ]
    pipe = entry.build()
    with cached(pipe, ONE_IN_TWO) as acceleration:
        for request in requests:
            output = entry.call(pipe, **request)
            assert all(count.cached_steps > 0 for count in acceleration.counts())
            assert torch.equal(output, cached_call("flux_dev", ONE_IN_TWO, **request))


def test_a_call_after_one_that_raised_midway_is_right() -> None:
    entry = TINY["wan22_t2v"]
    pipe = entry.build()
    expected = cached_call("wan22_t2v", ONE_IN_TWO, steps=6)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return values

    with cached(pipe, ONE_IN_TWO):
        with pytest.raises(KeyboardInterrupt):
            entry.call(pipe, steps=6, callback_on_step_end=stop)
        block = pipe.transformer.blocks[2]
        hook = block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            entry.call(pipe, steps=6)
        hook.remove()
        assert torch.equal(entry.call(pipe, steps=6), expected)


def test_calls_in_threads_give_what_each_gives_alone() -> None:
    entry = TINY["qwen_image"]
    requests: list[dict[str, Any]] = [
        {"steps": 7, "seed": 1},
        {"steps": 12, "seed": 2, "prompt": OTHER_PROMPT, "height": 96, "width": 96},
        {"steps": 9, "seed": 3, "true_cfg_scale": 1.0},
    ]
    pipe = accelerate_pipeline(entry.build(), quality="fast", cache=ONE_IN_TWO, attention=None)
    outputs: dict[int, torch.Tensor] = {}
    alone = [entry.call(pipe, **request) for request in requests]

    def run(index: int) -> None:
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        outputs[index] = entry.call(view, **requests[index])

    at_once(run, range(len(requests)))
    assert all(torch.equal(outputs[index], alone[index]) for index in range(len(requests)))


def test_two_accelerations_of_one_transformer_cache_each_its_own_way() -> None:
    entry = TINY["flux_dev"]
    pipe = entry.build()
    sharing = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    sharing.set_progress_bar_config(disable=True)
    with cached(pipe, EVERY_OTHER), cached(sharing, ONE_IN_TWO):
        outputs = [entry.call(one, steps=5) for one in (pipe, sharing, pipe)]
    assert torch.equal(outputs[0], cached_call("flux_dev", EVERY_OTHER, steps=5))
    assert torch.equal(outputs[1], cached_call("flux_dev", ONE_IN_TWO, steps=5))
    assert torch.equal(outputs[2], outputs[0])


def test_the_steps_of_a_mask_are_those_that_the_loop_makes() -> None:
    """Image-to-image with strength 0.75 makes 6 of 8 steps; Wan2.2 shares 8 between its experts."""
    preset = CacheConfig(step_mask="fast")
    pipe = TINY["flux_img2img"].build()
    with cached(pipe, preset) as acceleration:
        TINY["flux_img2img"].call(pipe, steps=8)
        assert [count.skipped for count in acceleration.counts()] == [(False, True, False, True, True, True)]
    pipe = TINY["wan22_t2v"].build()
    bins = CacheConfig(step_mask=([2], [6]), secondary=CacheConfig(threshold=1e-9))
    with cached(pipe, bins) as acceleration:
        TINY["wan22_t2v"].call(pipe, steps=8)
        counts = {(count.denoiser, count.branch): count for count in acceleration.counts()}
    total = len(counts["transformer", 0].skipped) + len(counts["transformer_2", 0].skipped)
    assert total == 8
    for branch in (0, 1):
        assert counts["transformer", branch].computed_steps == 2
        assert counts["transformer", branch].cached_steps > 0
        assert counts["transformer_2", branch].cached_steps == 0


def test_a_mask_that_an_expert_cannot_have_stops_the_call_before_its_first_block() -> None:
    entry = TINY["wan22_t2v"]
    pipe = entry.build()
    first_expert_only = CacheConfig(step_mask=([2], [6]), secondary=CacheConfig(step_mask=([1], [1])))
    with cached(pipe, first_expert_only), counted(pipe.transformer.blocks[0]) as runs:
        with pytest.raises(ConfigurationError, match=r"covers 2 steps, but one transformer makes \d; use bins"):
            entry.call(pipe, steps=8)
        assert not runs


def test_a_controlnet_between_the_blocks_is_refused() -> None:
    pipe = TINY["flux_controlnet"].build()
    with cached(pipe, NEVER), pytest.raises(UnsupportedError, match="ControlNet"):
        TINY["flux_controlnet"].call(pipe)


def test_blocks_replaced_since_are_refused() -> None:
    pipe = TINY["flux_dev"].build()
    with cached(pipe, NEVER):
        pipe.transformer.single_transformer_blocks[1] = copy.deepcopy(pipe.transformer.single_transformer_blocks[1])
        with pytest.raises(UnsupportedError, match="call accelerate_pipeline again"):
            TINY["flux_dev"].call(pipe)


def everything_global(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What must be the same before and after, of the libraries, their classes and the pipeline itself."""
    family = family_of(pipe)
    modules = [module for model in family.models(pipe).values() for module in model.modules()]
    objects = [pipe, pipe.scheduler, *modules]
    classes = {type(obj) for obj in objects} | {torch.nn.Module, torch.nn.ModuleList, logging.Logger}
    classes |= {cache_dit.BlockAdapterRegister, cache_dit.caching.FakeDiffusionPipeline, _AttentionBackendRegistry}
    classes |= {cache_dit.caching.CachedContextManager, cache_dit.caching.CachedContext}
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return {
        "classes": {(cls, name): id(value) for cls in classes for name, value in list(vars(cls).items())},
        "objects": [sorted(vars(obj)) for obj in objects],
        "modules": {(i, name): id(value) for i, obj in enumerate(modules) for name, value in vars(obj).items()},
        "submodules": {(i, name): id(value) for i, obj in enumerate(modules) for name, value in obj._modules.items()},
        "types": [type(obj) for obj in objects],
        "adapters": dict(cache_dit.BlockAdapterRegister._adapters),
        "backends": dict(_AttentionBackendRegistry._backends),
        "cache_dit": {name: id(value) for name, value in vars(cache_dit).items()},
        "loggers": [(log.level, *log.handlers, *log.filters) for log in loggers if isinstance(log, logging.Logger)],
        "warnings": list(warnings.filters),
    }


@pytest.mark.parametrize("name", ["flux_dev", "wan22_t2v"])
def test_nothing_of_the_model_or_the_libraries_differs_after_undo(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    entry = TINY[name]
    pipe = entry.build()
    entry.call(pipe)
    before = everything_global(pipe)
    with cached(pipe, CacheConfig(threshold=1.0, warmup=1, taylorseer_order=2)):
        entry.call(pipe)
        for _, path, blocks in rows(pipe):
            assert getattr(pipe.transformer, path) is not None
            assert isinstance(blocks, torch.nn.ModuleList)
            assert type(blocks) is torch.nn.ModuleList
        during = everything_global(pipe)
    after = everything_global(pipe)
    for what in before:
        assert after[what] == before[what], what
    assert {what for what in before if during[what] != before[what]} <= {"objects", "modules", "types", "classes"}
    assert "Cache-DiT" not in "".join(capfd.readouterr())


def test_residuals_are_dropped_with_the_call_but_the_counts_stay() -> None:
    pipe = TINY["flux_dev"].build()
    with cached(pipe, ONE_IN_TWO) as acceleration:
        TINY["flux_dev"].call(pipe, steps=4)
        state = acceleration.calls[-1][CACHE]
        assert not any(branch.prepared for branch in state._branches.values())
        (count,) = state.counts()
        assert (count.computed_steps, count.cached_steps) == (2, 2)


def test_bad_settings_raise_one_sentence_and_change_nothing() -> None:
    pipe = TINY["flux_dev"].build()
    family = family_of(pipe)
    before = everything_global(pipe)

    def refused(error: type[Exception], words: str, settings: CacheConfig, **changes: Any) -> None:
        arguments: dict[str, Any] = {"family": family, "owner": family, **changes}
        ledger = Ledger()
        with pytest.raises(error, match=words) as caught:
            attach_cache(pipe.transformer, settings, ledger=ledger, **arguments)
        assert "\n" not in str(caught.value)
        assert not ledger.changes

    refused(ConfigurationError, "fn=5 and cache.bn=3 are more than the 7 blocks", CacheConfig(fn=5, bn=3))
    secondary = CacheConfig(secondary=CacheConfig(fn=8))
    refused(ConfigurationError, "fn=8 and cache.bn=0 are more than the 7 blocks", secondary, position=1)
    refused(UnsupportedError, "no family says", CacheConfig(), family=dataclasses.replace(family, blocks=()))
    assert everything_global(pipe) == before
    pipe.transformer._is_cached = True
    refused(UnsupportedError, "cache-dit is on this FluxTransformer2DModel; take it off", CacheConfig())


THEIR_CACHES = {
    "first block": lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5)),
    "applied directly": lambda pipe: apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.5)),
    "Mag": lambda pipe: apply_mag_cache(pipe.transformer, MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8)),
    "TaylorSeer": lambda pipe: apply_taylorseer_cache(pipe.transformer, TaylorSeerCacheConfig()),
    "PAB": lambda pipe: apply_pyramid_attention_broadcast(
        pipe.transformer,
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ),
    "cache-dit": lambda pipe: cache_dit.enable_cache(pipe),
}


@pytest.mark.parametrize("theirs", THEIR_CACHES)
def test_a_second_cache_is_refused_in_either_order(theirs):
    entry, fast = TINY["flux_dev"], {"quality": "fast", "compile": None}
    pipe = accelerate_pipeline(entry.build(), **fast)
    THEIR_CACHES[theirs](pipe)
    try:
        with pytest.raises(UnsupportedError, match="is on this FluxTransformer2DModel; take it off with"):
            entry.call(pipe)
        with pytest.raises(UnsupportedError, match="or use cache=None"):
            accelerate_pipeline(pipe, **fast)
        accelerate_pipeline(pipe, **fast, cache=None)
    finally:
        if theirs == "cache-dit":
            cache_dit.disable_cache(pipe)


@pytest.mark.parametrize(
    "order",
    [order for order in itertools.permutations(("cache", "uncache", "ours", "remove"))
     if order.index("cache") < order.index("uncache") and order.index("ours") < order.index("remove")],
    ids=" ".join,
)  # fmt: skip
def test_cache_dits_own_switch_acts_as_on_a_stock_pipeline_whenever_ours_comes_and_goes(order):
    entry, settings = TINY["flux_dev"], {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 9.0}
    moves = {
        "cache": lambda: cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**settings)),
        "uncache": lambda: cache_dit.disable_cache(pipe),
        "ours": lambda: accelerate_pipeline(pipe, quality="exact"),
        "remove": lambda: pipe.acceleration.remove(),
    }
    pipe, cls = entry.build(), stock_class(entry.build())
    stock, before = entry.call(pipe), cls.__call__
    moves["cache"]()
    cached = entry.call(pipe)
    moves["uncache"]()
    assert not torch.equal(cached, stock)
    for position, move in enumerate(order):
        moves[move]()
        on = "cache" in order[: position + 1] and "uncache" not in order[: position + 1]
        assert torch.equal(entry.call(pipe), cached if on else stock), move
    assert type(pipe) is cls
    assert cls.__call__ is before
    assert not hasattr(cls, "_is_cached")
    assert torch.equal(entry.call(entry.build()), stock)
