"""Four ranks whose processes share one GPU: whole pipelines, with heads and tokens in each other's memory."""

import pytest

from tests.distributed.failure_ranks import on_mortal_ranks
from tests.gpu import one_gpu_cases as cases

pytestmark = pytest.mark.gpu
LAYOUTS = [{"ulysses": 4}, {"ulysses": 2, "ring": 2}]
PIPELINES = {
    "flux_dev": LAYOUTS,
    "qwen_image": [*LAYOUTS, {"cfg": 2, "ulysses": 2}],
    "wan22_t2v": [*LAYOUTS, {"cfg": 2, "ulysses": 2}],
    "hunyuan_video": LAYOUTS,
}


@pytest.mark.parametrize("name", PIPELINES)
def test_four_ranks_give_what_one_gives(name):
    check(4, name, PIPELINES[name])


@pytest.mark.parametrize("name", ["flux_dev", "hunyuan_video"])
def test_heads_in_two_parts_give_what_one_rank_gives(name):
    check(2, name, [{"ulysses": 2}], parts=True)


def check(ranks, name, layouts, **how):
    for outcome in on_mortal_ranks(ranks, cases.layouts, name, layouts, limit=150.0, start="spawn", **how):
        assert outcome.answer is not None, outcome.printed
        for layout, found in zip(layouts, outcome.answer, strict=True):
            print(name, layout, found)
            assert found["shared"] < 1e-4
            assert found["removed"] == 0.0
            assert "into the other GPUs' memory" in found["carrier"], found
