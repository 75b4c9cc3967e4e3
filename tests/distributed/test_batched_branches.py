"""Guidance branches that come as one batch: ranks compute some of its samples each, and get those of one rank."""

import functools

import pytest

from tests.distributed import layout_cases
from tests.distributed.guidance_cases import differences, floor, forward_difference, in_double, uncertain_batches
from tests.distributed.ranks import on_ranks
from tests.floors import EPS, is_rounding
from tests.parameters import exhaustive

PROMPTS = ["a fox", "two golden robots that fly over a city at night, soft light"]
TWO = {"prompt": PROMPTS, "negative_prompt": ["", "low quality and very blurry indeed"]}
Z_IMAGE = {
    "guided": ({}, [1, 1]),
    "of two prompts": (TWO, [2, 2]),
    "with two prompts and no guidance": ({**TWO, "guidance_scale": 0.0}, [1, 1]),
    "with one sample and no guidance": ({"guidance_scale": 0.0}, [1, 1]),
    "of three images without guidance": ({"guidance_scale": 0.0, "num_images_per_prompt": 3}, [3, 3]),
    "guided in the first half": ({"cfg_truncation": 0.2, "steps": 4}, [1] * 4),
    "whose norm is kept": ({"cfg_normalization": 1.0}, [1, 1]),
    "of odd size with a long prompt": ({"height": 80, "width": 112, "prompt": PROMPTS[1]}, [1, 1]),
}
PLAIN = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
UNGUIDED = {**PLAIN, "guidance_scale": 1.0, "audio_guidance_scale": 1.0}
LTX2 = {
    # Calls for skipped attention and for each stream by itself follow, of one sample, which every rank computes.
    "as it is": ({}, [1, 1, 1] * 2),
    "of two prompts": (TWO, [2, 1, 1] * 2),
    "with text guidance alone": (PLAIN, [1, 1]),
    "guided for the sound alone": ({**PLAIN, "guidance_scale": 1.0}, [1, 1]),
    "of one sample and no guidance": (UNGUIDED, [1, 1]),
    "of three videos without guidance": ({**UNGUIDED, "num_videos_per_prompt": 3}, [3, 3]),
    "of odd size with a long prompt": ({"width": 160, "num_frames": 17, "prompt": PROMPTS[1]}, [1, 1, 1] * 2),
}


def check(name, batches, change=None, **call):
    found = on_ranks(2, differences, name, change, **call)
    for each in found:
        # What the script does in single precision, whatever models compute in, rounds a value or two otherwise.
        measured = functools.partial(floor, name) if change is None else each["size"] * EPS
        assert is_rounding(each["shared"], measured)
        assert each["removed"] == 0.0
        assert list(each["batches"]) == batches


@pytest.mark.parametrize("call", Z_IMAGE)
def test_a_call_of_z_image(call):
    arguments, batches = Z_IMAGE[call]
    check("z_image", batches, **arguments)


@pytest.mark.parametrize("call", exhaustive(*LTX2, but=list(LTX2)[:4]))  # the rest is Z-Image's too
def test_a_call_of_ltx2_video_and_sound(call):
    arguments, batches = LTX2[call]
    check("ltx2", batches, **arguments)


def test_image_to_image():
    check("z_image_img2img", [1, 1])


def test_a_batch_whose_samples_cannot_be_told_apart_for_certain_is_computed_whole():
    assert on_ranks(2, uncertain_batches) == [[1, 2, 2, 2]] * 2


@pytest.mark.parametrize("name", ["z_image", "ltx2"])
def test_one_forward_differs_by_rounding_alone(name):
    assert all(is_rounding(*found) for found in on_ranks(2, forward_difference, name))


@pytest.mark.parametrize("name", ["z_image", "ltx2"])
def test_with_models_in_double_precision_only_the_scripts_own_single_precision_is_left(name):
    check(name, [1, 1], in_double, **(PLAIN if name == "ltx2" else {}))


@pytest.mark.parametrize("name", ["z_image", "ltx2"])
def test_sharing_a_batch_changes_rounding_which_tier_exact_does_not_allow(name):
    for words in on_ranks(2, layout_cases.refused, name, {"cfg": 2}, quality="exact"):
        assert words.startswith("ConfigurationError: ParallelConfig(cfg=2): cfg=2 changes rounding")
        assert "use parallel=None" in words


@pytest.mark.parametrize("name", ["z_image", "ltx2"])
def test_other_layouts_are_refused_and_name_the_one_that_fits(name):
    for words in on_ranks(2, layout_cases.refused, name, {"ulysses": 2}):
        assert "is not known to be possible for" in words
        assert "use cfg=2" in words


@pytest.mark.parametrize("name", ["hunyuan_video_15", "z_image", "ltx2"])
def test_auto_shares_the_branches(name):
    assert all(words.startswith("cfg=2: ") for words in on_ranks(2, layout_cases.planned, name))
