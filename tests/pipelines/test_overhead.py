"""What acceleration adds to a call in Python, of all files; the counts are the same on any machine."""

import itertools

import pytest

from benchmarks.overhead import python_calls
from pipeboost import accelerate_pipeline
from tests.pipelines.tiny import TINY


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
@pytest.mark.parametrize("prompts", ["one prompt", "new prompts"])
def test_a_warm_call_of_two_steps_makes_2000_python_calls_more_than_stock_at_most(name, prompts):
    entry = TINY[name]
    counts = []
    for pipe in (entry.build(), accelerate_pipeline(entry.build(), quality="exact")):
        numbers = itertools.count() if prompts == "new prompts" else itertools.repeat(0)
        counts.append(
            python_calls(lambda: entry.call(pipe, num_inference_steps=2, prompt=f"picture {next(numbers)}"))  # noqa: B023
        )
    before, after = counts
    where = "\n".join(f"{calls} {file}: {function}" for (file, function), calls in (after - before).most_common(20))
    assert after.total() - before.total() <= 2000, where
