"""A row of blocks decides by itself which steps it skips, whatever else runs in the process."""

import pytest
import torch
from torch import nn

from pipeboost.core.config import CacheConfig
from pipeboost.features.cache.blocks import BlocksBranch, fits


class Block(nn.Module):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 1.5


def test_no_decision_is_averaged_over_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a collective")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    branch, states = BlocksBranch(CacheConfig(warmup=1, max_continuous=2), None), torch.ones(1, 4, 8)
    for _ in range(5):
        image = states
        for place in range(3):
            image = branch.run((place, 3, "image"), lambda image=image: image * 1.5, image, states, None)
    assert branch.skipped == [False, True, True, False, True]


@pytest.mark.parametrize(("returns", "expected"), [("image", True), ("image_text", False), ("text_image", False)])
def test_blocks_fit_the_form_they_have(returns: str, expected: bool) -> None:
    assert fits([Block()], returns) is expected  # type: ignore[arg-type]


def test_blocks_without_text_states_do_not_fit() -> None:
    assert not fits([nn.Linear(2, 2)], "image")
