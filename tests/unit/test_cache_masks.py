"""The number of steps that each expert makes, and the step masks made from it."""

from types import SimpleNamespace

import cache_dit
import pytest
import torch

from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.features.cache.masks import COMPUTED_SHARE, computed_steps
from pipeboost.features.cache.steps import settings_of, steps_of_experts
from pipeboost.patches import flux, wan


@pytest.mark.parametrize("preset", COMPUTED_SHARE)
def test_every_preset_serves_every_number_of_steps_and_computes_its_share(preset: str) -> None:
    for steps in range(1, 101):
        mask = computed_steps(CacheConfig(step_mask=preset), steps)
        assert mask is not None
        assert len(mask) == steps
        assert mask[0] == 1
        assert sum(mask) == max(min(2, steps), round(COMPUTED_SHARE[preset] * steps))
        bounded = computed_steps(CacheConfig(step_mask=preset, max_continuous=2), steps)
        assert bounded is not None
        assert "000" not in "".join(map(str, bounded))
        assert all(wide <= narrow for wide, narrow in zip(mask, bounded, strict=True))


def test_listed_steps_are_computed_and_are_for_one_number_of_steps() -> None:
    settings = CacheConfig(step_mask=[0, 2, 5], steps=7)
    assert computed_steps(settings, 7) == [1, 0, 1, 0, 0, 1, 0]
    with pytest.raises(ConfigurationError, match="is for 7 steps, but one transformer makes 8 in this call; use num"):
        computed_steps(settings, 8)


def test_no_mask_skips_more_in_a_row_than_it_may() -> None:
    for schedule in ({"step_mask": ([2, 1], [3, 1])}, {"step_mask": (0, 4), "steps": 7}):
        with pytest.raises(ConfigurationError, match=r"skips 3 steps in a row, more than cache.max_cont"):
            computed_steps(CacheConfig(max_continuous=2, **schedule), 7)
        assert computed_steps(CacheConfig(max_continuous=3, **schedule), 7) is not None


def test_bins_are_those_of_cache_dit() -> None:
    for bins in (([3, 1], [2, 4]), ([4, 2, 1], [1, 2]), ([1, 1], [3, 2, 4])):
        for steps in range(1, sum(map(sum, bins)) + 1):
            theirs = cache_dit.steps_mask(compute_bins=bins[0], cache_bins=bins[1], total_steps=steps)
            assert computed_steps(CacheConfig(step_mask=bins), steps) == theirs


def test_bins_that_do_not_cover_the_steps_raise() -> None:
    with pytest.raises(ConfigurationError, match="covers 10 steps, but one transformer makes 11; use bins whose sum"):
        computed_steps(CacheConfig(step_mask=([3, 1], [2, 4])), 11)


def test_an_expert_without_steps_needs_no_mask() -> None:
    assert computed_steps(CacheConfig(step_mask="fast"), 0) is None


def test_a_mask_needs_a_pipeline_that_tells_its_steps_and_the_residual_does_not() -> None:
    silent = SimpleNamespace()
    assert steps_of_experts(silent, wan.FAMILY) == (None, None)
    assert computed_steps(CacheConfig(), None) is None
    with pytest.raises(UnsupportedError, match="num_timesteps"):
        computed_steps(CacheConfig(step_mask="fast"), None)


def test_steps_are_those_of_the_loop_and_wan_shares_them_at_its_boundary() -> None:
    timesteps = torch.tensor([1000.0, 950, 900, 875, 800, 500, 100])
    scheduler = SimpleNamespace(timesteps=timesteps, config=SimpleNamespace(num_train_timesteps=1000))
    pipe = SimpleNamespace(scheduler=scheduler, num_timesteps=7, config={"boundary_ratio": 0.875})
    assert steps_of_experts(pipe, wan.FAMILY) == (4, 3)
    pipe.num_timesteps = 5  # video-to-video leaves out the first ones
    assert steps_of_experts(pipe, wan.FAMILY) == (2, 3)
    pipe.config = {}
    assert steps_of_experts(pipe, wan.FAMILY) == (5, 0)
    assert steps_of_experts(pipe, flux.FAMILY) == (5,)


def test_secondary_settings_are_for_all_experts_but_the_first() -> None:
    low = CacheConfig(fn=2)
    assert settings_of(CacheConfig(secondary=low), 1) is low
    assert settings_of(both := CacheConfig(secondary=low), 0) is both
    assert settings_of(both := CacheConfig(), 1) is both
