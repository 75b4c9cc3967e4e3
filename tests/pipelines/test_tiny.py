"""The tiny pipelines can carry parity tests: they are deterministic and every part of them is heard in the output."""

import pytest
import torch

from tests.pipelines.tiny import OTHER_PROMPT, TINY


@pytest.mark.parametrize("name", TINY)
def test_same_seed_gives_the_same_finite_varied_output(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    output = entry.call(pipe)
    assert output.dtype == torch.float32
    assert torch.isfinite(output).all()
    assert output.std() > 0.02
    assert torch.equal(output, entry.call(pipe))
    assert torch.equal(output, entry.call(entry.build()))
    assert not torch.equal(output, entry.call(pipe, seed=1))
    assert (output - entry.call(pipe, prompt=OTHER_PROMPT)).abs().max() > 0.02
