"""A guider makes the branches of HunyuanVideo-1.5, each a call: ranks share them, to the bit of one rank."""

import pytest
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig

from tests.distributed.guidance_cases import differences, guided_by, strides_of_two_branches
from tests.distributed.ranks import on_ranks

SKIPPED = LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
SKIPPING = {"skip_layer_config": SKIPPED, "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
GUIDERS = {
    "its own": (None, 4, [[1, 1], [1, 1]]),
    "rescaled": (guided_by(ClassifierFreeGuidance, guidance_scale=4.0, guidance_rescale=0.7), 4, [[1, 1], [1, 1]]),
    "projected": (guided_by(AdaptiveProjectedGuidance, guidance_scale=4.0), 4, [[1, 1], [1, 1]]),
    # A step's only call is the first rank's, and its prediction is rescaled at once.
    "off": (guided_by(ClassifierFreeGuidance, enabled=False, guidance_rescale=0.7), 2, [[1, 1], []]),
    "off at first": (guided_by(ClassifierFreeGuidance, start=0.5, guidance_rescale=0.7), 3, [[1, 1], [1]]),
    "of three calls at last": (guided_by(SkipLayerGuidance, guidance_rescale=0.7, **SKIPPING), 5, [[1] * 3, [1] * 2]),
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_a_guiders_branches_are_shared_and_the_result_is_that_of_one_rank(guider):
    change, calls, batches = GUIDERS[guider]
    found = on_ranks(2, differences, "hunyuan_video_15", change)
    assert [each["shared"] for each in found] == [0.0, 0.0]
    assert [each["removed"] for each in found] == [0.0, 0.0]
    assert [list(each["batches"]) for each in found] == batches
    assert sum(map(len, batches)) == calls


def test_prompts_of_two_lengths_with_text_to_draw_and_an_odd_size():
    prompts = ['a fox before a wall that says "snow"', "two golden robots that fly over a city at night"]
    found = on_ranks(2, differences, "hunyuan_video_15", prompt=prompts, negative_prompt=["", "blurry"], height=72)
    assert [each["shared"] for each in found] == [0.0, 0.0]
    assert [list(each["batches"]) for each in found] == [[2, 2], [2, 2]]


@pytest.mark.parametrize(
    "name", ["hunyuan_video_15", "hunyuan_video_true_cfg", "flux_true_cfg", "qwen_image", "wan21_t2v"]
)
def test_every_rank_gets_predictions_laid_out_as_stocks_so_that_sums_over_them_round_alike(name):
    for stock, first, second in on_ranks(2, strides_of_two_branches, name):
        assert first == second == stock
