"""The layout that `parallel="auto"` chooses where memory is short, and what it names where it finds none."""

import pytest
import torch

from pipeboost.contract.model_info import ComponentSize, ModelInfo, Split
from pipeboost.contract.registry import family_named
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.features.parallel.layout import Ranks, check_layout, choose_layout, describe_layout

GIB = 2**30


def ranks(pipeline, count, free=None, *, transformer=38, text_encoder=15, splits=(2, 4)):
    """Of Qwen-Image's transformer, 38 GiB, a rank then has 19.5 or 10.25; of its text encoder 8 or 4.5."""
    sizes = {"transformer": transformer * GIB, "text_encoder": text_encoder * GIB}
    model = ModelInfo(
        pipeline,
        torch.bfloat16,
        sum(sizes.values()),
        components=tuple(
            ComponentSize(path, f"{path}s", None, size, block_bytes=size, largest_block=size)
            for path, size in sizes.items()
        ),
        heads=24,
        splits={path: Split(size - GIB, splits) for path, size in sizes.items()},
    )
    return Ranks(count, family_named(pipeline), model, "lossless", attention=True, free=free)


@pytest.mark.parametrize(
    ("count", "gib", "chosen"),
    [
        (4, 80, "cfg=2, ulysses=2"),
        (4, 40, "cfg=2, tensor=2"),
        (4, 32, "tensor=4"),  # with cfg=2 they would not fit
        (4, 16, "cfg=2, ulysses=2"),  # they fit in no layout, and whole weights can wait on the host
        (2, 80, "cfg=2"),
        (2, 40, "tensor=2"),
        (2, 24, "cfg=2"),
    ],
)
def test_as_few_ranks_share_the_weights_as_will_do(count, gib, chosen):
    assert describe_layout(choose_layout(ranks("QwenImagePipeline", count, gib * GIB))[0]) == chosen


def test_degrees_that_the_model_does_not_allow_are_passed_over():
    assert describe_layout(choose_layout(ranks("QwenImagePipeline", 4, 40 * GIB, splits=(4,)))[0]) == "tensor=4"
    assert describe_layout(choose_layout(ranks("QwenImagePipeline", 4, 40 * GIB, splits=()))[0]) == "cfg=2, ulysses=2"


def test_flux_shares_tokens_and_where_it_must_weights():
    flux = {"transformer": 22, "text_encoder": 9}
    assert describe_layout(choose_layout(ranks("FluxPipeline", 4, 80 * GIB, **flux))[0]) == "ulysses=4"
    assert describe_layout(choose_layout(ranks("FluxPipeline", 4, 24 * GIB, **flux))[0]) == "ulysses=2, tensor=2"


@pytest.mark.parametrize("pipeline", ["HunyuanVideo15Pipeline", "ZImagePipeline", "LTX2Pipeline"])
def test_where_four_ranks_cannot_share_a_sample_two_samples_are_named(pipeline):
    four = ranks(pipeline, 4)
    with pytest.raises(UnsupportedError, match=r"parallel='auto' finds no layout for 4 ranks.*use replicas=2, cfg=2$"):
        choose_layout(four)
    check_layout(ParallelConfig(replicas=2, cfg=2), four)
