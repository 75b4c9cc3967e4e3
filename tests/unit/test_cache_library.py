"""cache-dit comes in late and quietly, and its decisions stay in this process."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeboost.core.config import CacheConfig
from pipeboost.features.cache.library import BlockRow
from pipeboost.features.cache.masks import computed_steps

_LATE_AND_QUIET = """
import logging, sys, warnings
import diffusers, pipeboost, transformers
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry as registry
import pipeboost.features.cache
assert "cache_dit" not in sys.modules

def state():
    methods = {name: vars(logging.Logger)[name] for name in ("warning_once", "info_once")}
    root = (logging.root.level, list(logging.root.handlers))
    backends = (registry._active_backend, dict(registry._backends), list(AttentionBackendName.__members__))
    return methods, root, backends, list(warnings.filters), diffusers.logging.get_verbosity()

transformers.utils.logging.get_logger("x")
before = state()
from pipeboost.features.cache.library import BlockRow
BlockRow("blocks", "image")
assert "cache_dit" in sys.modules
for was, is_now in zip(before, state()):
    assert was == is_now, (was, is_now)
"""


def test_cache_dit_is_imported_only_where_a_cache_is_attached_and_changes_nothing_around_it() -> None:
    run = subprocess.run([sys.executable, "-c", _LATE_AND_QUIET], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


class Block(nn.Module):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 1.5


def test_no_decision_is_averaged_over_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a collective")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    blocks = [Block(), Block(), Block()]
    cache = BlockRow("blocks", "image").cache(blocks, CacheConfig(warmup=1, max_continuous=2), steps=5, mask=None)
    states = torch.ones(1, 4, 8)
    skipped = [cache(states, states)[1] for _ in range(5)]
    assert skipped == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("policy", "threshold", "limit", "expected"),
    [
        ("static", 1e-9, None, "10010001"),
        ("dynamic", 1e-9, None, "11111111"),
        ("dynamic", 1.0, 3, "10010001"),
        ("dynamic", 1.0, 2, "10010011"),
        ("dynamic", 1.0, 1, "10110101"),
    ],
)
def test_a_mask_decides_alone_or_leaves_its_other_steps_to_the_residual(
    policy: str, threshold: float, limit: int | None, expected: str
) -> None:
    blocks = [Block(), Block(), Block()]
    bins = ((1, 1, 1), (2, 3, 2))
    settings = CacheConfig(step_mask=bins, policy=policy, threshold=threshold, warmup=8, max_continuous=limit)
    mask = computed_steps(settings, 8)
    cache = BlockRow("blocks", "image").cache(blocks, settings, steps=8, mask=mask)
    states = torch.ones(1, 4, 8)
    # What the first block adds differs a little from step to step.
    skipped = [cache(states * (1 + step / 100), states)[1] for step in range(8)]
    assert "".join(str(1 - each) for each in skipped) == expected


@pytest.mark.parametrize(("returns", "fits"), [("image", True), ("image_text", False), ("text_image", False)])
def test_blocks_fit_the_form_they_have(returns: str, fits: bool) -> None:
    assert BlockRow("blocks", returns).fits([Block()]) is fits  # type: ignore[arg-type]


def test_blocks_without_text_states_do_not_fit() -> None:
    assert not BlockRow("blocks", "image").fits([nn.Linear(2, 2)])
