"""Ranks form a team only where all want the same, share the script's forwards only, and leave nothing."""

import pytest
import torch

from pipeboost import ParallelConfig
from pipeboost.contract.model_info import ModelInfo
from pipeboost.contract.registry import family_of
from pipeboost.core.errors import UnsupportedError
from pipeboost.features.parallel.layout import Ranks, check_layout
from tests.distributed.ranks import on_ranks
from tests.distributed.team_cases import (
    callback_differences,
    differences_of_two_pipelines_with_one_transformer,
    differences_with_a_callback_of_diffusers,
    differences_with_stages_that_run_the_denoiser,
    early_reading,
    left_by_a_dropped_pipeline,
    odd_prediction,
    opened_difference,
    progress_of_a_copy,
    refused,
    refused_beside_another,
)
from tests.floors import is_rounding
from tests.pipelines.tiny import TINY

TOKENS = ParallelConfig(ulysses=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ({"parallel": ParallelConfig(replicas=2)}, {"parallel": TOKENS}),
            "ranks planned differently: rank 0 parallel: replicas=2 on cpu (ParallelConfig(",
        ),
        (
            ({"parallel": TOKENS}, {"parallel": ParallelConfig(ulysses=2, vae=False)}),
            "ranks planned differently: rank 0 parallel: ulysses=2 on cpu (ParallelConfig(",
        ),
    ],
    ids=["layouts", "settings of one layout"],
)
def test_ranks_that_want_different_things_are_told_so_before_they_share_anything(settings, sentence):
    for found in on_ranks(2, refused, "flux_dev", *settings):
        assert found.startswith(f"UnsupportedError: {sentence}")


def test_a_forward_outside_a_script_is_no_guidance_branch_so_that_every_rank_has_its_result():
    assert on_ranks(2, opened_difference, "flux_true_cfg", cfg=2) == [0.0, 0.0]


def test_a_forward_in_a_callback_is_no_guidance_branch_so_that_every_rank_has_its_result():
    assert on_ranks(2, callback_differences, "flux_true_cfg", cfg=2) == [[0.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_forward_in_a_callback_of_diffusers_own_class_is_no_guidance_branch(several):
    found = on_ranks(2, differences_with_a_callback_of_diffusers, "flux_true_cfg", several, cfg=2)
    assert found == [[0.0] * 3, [0.0] * 3]


def test_a_forward_in_a_stage_of_the_users_is_no_guidance_branch():
    found = on_ranks(2, differences_with_stages_that_run_the_denoiser, "flux_true_cfg", cfg=2)
    assert found[0] == found[1] == [0.0] * len(found[0])


def test_a_script_that_reads_a_prediction_before_the_other_ranks_have_sent_it_gets_nan_and_is_found_out():
    first, second = on_ranks(2, early_reading)
    assert (first["early"], second["early"]) == (False, True)
    assert first["filled"] == second["filled"] == 0.0
    assert all("the latents of rank 1 are not those of rank 0" in found["refused"] for found in (first, second))


def test_predictions_of_another_dtype_than_the_latents_are_refused_in_a_sentence():
    for found in on_ranks(2, odd_prediction):
        assert "the transformer returned" in found
        assert "of torch.float64; give it latents of the dtype" in found


def test_a_pipeline_that_is_dropped_takes_the_groups_of_its_ranks_along():
    assert on_ranks(2, left_by_a_dropped_pipeline, "flux_true_cfg", cfg=2) == [[], []]


def test_more_ranks_than_guidance_branches_are_refused_where_the_script_combines_them():
    family = family_of(TINY["wan21_t2v"].build())
    model = ModelInfo("WanPipeline", torch.float32, 0, model="Wan", heads=4)
    with pytest.raises(UnsupportedError, match="cfg=4 is not 2, as many guidance branches as a step of Wan has; use"):
        check_layout(ParallelConfig(cfg=4), Ranks(4, family, model, "lossless", attention=True))


@pytest.mark.parametrize("second", [{"ulysses": 2}, {"ring": 2}], ids=["ulysses", "ring"])
def test_two_pipelines_with_one_transformer_share_its_tokens_each_in_its_layout(second):
    for *shared, stock in on_ranks(
        2, differences_of_two_pipelines_with_one_transformer, "flux_dev", {"ulysses": 2}, second
    ):
        assert is_rounding(max(shared), lambda: TINY["flux_dev"].floor(output_type="latent"))
        assert stock == 0.0


@pytest.mark.parametrize(
    ("layouts", "sentence"),
    [
        (({"ulysses": 2}, {"cfg": 2}), "whose ranks share its tokens, and those of this one do not; give both"),
        (({"cfg": 2}, {"ring": 2}), "whose ranks do not share its tokens, and those of this one do; give both"),
    ],
    ids=["shares", "does not"],
)
def test_two_pipelines_with_one_transformer_of_which_one_shares_its_tokens_are_refused_in_words(layouts, sentence):
    for found in on_ranks(2, refused_beside_another, "flux_dev", *layouts):
        assert sentence in found


@pytest.mark.parametrize(("name", "way_out"), [("z_image", "parallel=None"), ("flux_dev", "cfg=2")])
def test_where_no_layout_suits_the_tier_the_sentence_speaks_of_the_tier_and_of_no_layout(name, way_out):
    for found in on_ranks(2, refused, name, *[{"quality": "exact", "parallel": "auto"}] * 2):
        assert "parallel='auto': 2 ranks cannot share" in found
        assert "at quality='exact', which allows nothing but guidance branches" in found
        assert f"; use quality='lossless' or {way_out}" in found
        assert "ring" not in found


def test_a_copy_of_a_pipeline_shows_its_progress_again_once_the_pipeline_is_stock():
    assert on_ranks(2, progress_of_a_copy, "flux_dev", ulysses=2) == [[False, False], [True, False]]
