"""What acceleration adds to a call in Python, of all files; the counts are the same on any machine."""

import pytest

from benchmarks.overhead import python_calls
from pipeboost import accelerate_pipeline
from tests.pipelines.tiny import TINY


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_a_warm_call_of_two_steps_makes_1500_python_calls_more_than_stock_at_most(name):
    entry = TINY[name]
    stock, ours = entry.build(), entry.build()
    accelerate_pipeline(ours, quality="exact", reuse=None)
    before, after = (python_calls(lambda pipe=pipe: entry.call(pipe, num_inference_steps=2)) for pipe in (stock, ours))
    where = "\n".join(f"{calls} {file}: {function}" for (file, function), calls in (after - before).most_common(20))
    assert after.total() - before.total() <= 1500, where
