"""Ranks beside a mesh encode and decode for it: the same results on every rank, while the mesh denoises."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeboost import ParallelConfig
from pipeboost.contract.registry import family_of
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.features.parallel import Ranks, check_layout, choose_layout
from pipeboost.stages import Composition, Stage, StageParallelism
from tests.distributed import beside_cases as cases
from tests.distributed.failure_ranks import on_mortal_ranks
from tests.distributed.ranks import on_ranks
from tests.distributed.team_cases import left_by_a_dropped_pipeline
from tests.pipelines.tiny import TINY

ONE = {"cfg": 2, "beside": 1}
TWO = {"ulysses": 2, "beside": 2}
TIMEOUT = 2.0
# Without ranks beside them, ranks that share tokens share the VAE too, which changes rounding.
LAYOUTS = {
    "qwen_image": ({"cfg": 2}, ONE, "exact"),
    "qwen_image_edit": ({"cfg": 2}, ONE, "exact"),  # its text encoder sees the picture too
    "wan21_t2v": ({"ulysses": 2, "vae": False}, TWO, "lossless"),
    "ltx2": ({"cfg": 2, "vae": False}, {"cfg": 2, "beside": 2}, "lossless"),
    "flux_kontext": ({}, {"beside": 1}, "exact"),
}


def ranks_of(layout):
    return ParallelConfig(**layout).size


@pytest.mark.parametrize("name", LAYOUTS)
def test_results_and_random_state_are_those_of_the_same_layout_without_ranks_beside(name):
    without, layout, quality = LAYOUTS[name]
    expected = on_ranks(ranks_of(without), cases.results, name, without, quality=quality)[0]
    for found in on_ranks(ranks_of(layout), cases.results, name, layout, quality=quality):
        # The second has no generator, so that all ranks draw as the first one does.
        assert torch.equal(found["results"][0], expected["results"][0])
        assert torch.equal(found["results"][1], expected["results"][1])
        assert found["random"] == expected["random"]


def test_each_rank_does_its_own_part_and_remove_leaves_stock_and_nothing_else():
    stock = TINY["wan21_i2v"].call(TINY["wan21_i2v"].build(), steps=1)
    mesh = [{"transformer"}] * 2
    one = on_ranks(3, cases.results, "wan21_i2v", ONE, steps=1)
    assert [found["worked"] for found in one] == [*mesh, {"text_encoder", "image_encoder", "encoder", "decoder"}]
    two = on_ranks(4, cases.results, "wan21_i2v", {"cfg": 2, "beside": 2}, steps=1)
    assert [found["worked"] for found in two] == [*mesh, {"text_encoder", "image_encoder"}, {"encoder", "decoder"}]
    for found in (*one, *two):
        assert torch.equal(found["removed"], stock)
        assert found["left"] == []
    assert "cfg=2, beside=1: as asked for; rank 2 encodes and decodes, and needs no transformer" in one[0]["plan"]
    assert "rank 2 encodes texts and images, rank 3 has the VAE" in two[3]["plan"]


@pytest.mark.parametrize(
    ("name", "layout", "quality"),
    [("qwen_image", ONE, "exact"), ("wan21_t2v", TWO, "lossless"), ("qwen_image_edit", {"beside": 2}, "exact")],
    ids=["qwen_image", "wan21_t2v", "qwen_image_edit"],
)
def test_requests_that_overlap_give_what_they_give_one_by_one_on_every_rank(name, layout, quality):
    first, *others = on_ranks(ranks_of(layout), cases.of_list, name, layout, quality=quality)
    for found in (first, *others):
        assert len(found["list"]) == 4
        assert all(map(torch.equal, found["list"], first["alone"]))
        assert all(map(torch.equal, found["alone"], first["alone"]))
        assert found["left"] == []
    assert {"text encoding", "denoising", "decoding"} <= first["stages"]
    assert "denoising" not in others[-1]["stages"]


def test_a_list_that_comes_first_after_a_move_to_another_device_runs_on_the_ranks_planned_anew():
    assert on_ranks(3, cases.of_list_after_a_move, "qwen_image", ONE) == [True] * 3


def test_a_list_that_is_given_up_leaves_the_ranks_in_step():
    # At times that differ by more than ranks wait for each other where a call has failed.
    for found in on_ranks(3, cases.of_list, "qwen_image", ONE, take=2, late=1.1):
        assert all(map(torch.equal, found["list"], found["alone"]))
        assert (len(found["list"]), len(found["alone"]), found["left"]) == (2, 4, [])


@pytest.mark.parametrize("beside", [1, 2])
def test_while_a_request_denoises_the_one_before_it_is_decoded_and_the_next_one_encoded(beside):
    count = 2 + beside
    assert on_ranks(count, cases.overlapping, "qwen_image", {"cfg": 2, "beside": beside}, "overlap") == [4] * count


def test_what_the_script_refuses_is_refused_on_every_rank_and_the_next_call_has_the_same_groups():
    for found in on_ranks(3, cases.bad_request, "qwen_image", ONE):
        assert (found["taken"], found["refused"]["raised"]) == (2, "ValueError")
        assert "`prompt` has to be of type" in found["refused"]["text"]
        assert found["disagreement"]["raised"] == "DisagreementError"
        assert "3 requests on rank 0, but 4 on rank 2" in found["lengths"]["text"]
        assert "run_many is under way" in found["inside"]["text"]
        assert found["after"]["returned"] == found["stock"]


def test_what_a_rank_beside_raises_is_raised_on_every_rank_and_the_next_call_works():
    runs = [("text encoding", False), ("decoding", True)]
    with ThreadPoolExecutor(2) as threads:
        for outcomes in threads.map(lambda run: _failing("raise", 2, run[0], listed=run[1]), runs):
            for outcome in outcomes:
                first, second = outcome.answer["first"], outcome.answer["second"]
                assert (first["raised"], first["text"]) == ("ValueError", "boom on rank 2")
                assert "returned" in second
                assert outcome.answer["threads"] == []


@pytest.mark.parametrize("kind", ["kill later", "sleep"])
def test_a_rank_that_is_killed_or_sleeps_is_named_wherever_it_is_and_no_rank_hangs(kind):
    runs = [(2, "text encoding", False), (2, "decoding", True), (0, "denoising", False), (1, "denoising", True)]
    with ThreadPoolExecutor(len(runs)) as threads:
        found = threads.map(lambda run: _failing(kind, run[0], run[1], listed=run[2]), runs)
        for (rank, stage, _), outcomes in zip(runs, found, strict=True):
            assert outcomes[rank].exit_code == (-9 if kind == "kill later" else 1)
            for other in [outcome for each, outcome in enumerate(outcomes) if each != rank]:
                told = other.answer["first"]
                assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", rank, stage), told
                assert told["signal"] == ("SIGKILL" if kind == "kill later" else None)
                assert told["seconds"] < TIMEOUT + 10


def test_an_error_on_one_rank_of_the_mesh_ends_the_list_on_all():
    outcomes = _failing("raise", 1, "denoising", listed=True)
    first, failed, beside = (outcome.answer["first"] for outcome in outcomes)
    assert (failed["raised"], failed["text"]) == ("ValueError", "boom on rank 1")
    for other in (first, beside):
        assert (other["raised"], other["rank"], other["stage"]) == ("RankFailedError", 1, "denoising")
        assert "ValueError: boom on rank 1" in other["traceback"]


def test_after_a_message_that_broke_off_none_is_taken_for_its_rest():
    assert on_ranks(2, cases.torn_message)[1] == ["RankFailedError", "PipeboostError", "PipeboostError"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beside": 3}, r"parallel.beside=3 must be an integer from 0 to 2"),
        ({"beside": 1, "replicas": 2}, r"parallel.beside=1 serves one sample at a time, and parallel.replicas=2 makes"),
        ({"beside": 1}, r"ParallelConfig\(beside=1\) is for 2 ranks, and there are 4 ranks; use tensor=3, beside=1 or"),
        ({"ulysses": 3, "beside": 1, "vae": True}, r"parallel.vae=True shares among the ranks what parallel.beside=1"),
        ({"tensor": 3, "beside": 1, "text_encoder": True}, r"parallel.text_encoder=True shares among the ranks what"),
        ({"cfg": 3, "beside": 1}, r"ParallelConfig\(cfg=3, beside=1\): cfg=3 is not 2, .*; use tensor=3, beside=1 or"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_a_sentence(settings, sentence):
    family = family_of(TINY["flux_true_cfg"].build())
    ranks = Ranks(4, family, "Flux", 6, "lossless", attention=True)
    with pytest.raises((ConfigurationError, UnsupportedError), match=sentence):
        check_layout(ParallelConfig(**settings), ranks)


def test_auto_leaves_no_rank_beside():
    family = family_of(TINY["flux_true_cfg"].build())
    for count in (2, 3, 4):
        layout, _, _ = choose_layout(Ranks(count, family, "Flux", 12, "lossless", attention=True))
        assert (layout.beside, layout.size) == (0, count)


def test_a_stage_of_the_users_cannot_run_beside_the_mesh():
    for words in on_ranks(2, cases.user_stage_beside):
        assert words.startswith(
            "UnsupportedError: stage 'mine' asks for StageParallelism.BESIDE, which is for built-in"
        )


@pytest.mark.parametrize("kind", [StageParallelism.REPLICATED, StageParallelism.MAIN_RANK], ids=str)
def test_stages_of_the_users_run_on_the_mesh_where_they_say_and_their_built_in_neighbours_beside(kind):
    first, second, beside = on_ranks(3, cases.user_stages, "qwen_image", ONE, kind)
    for found in (first, second, beside):
        assert found["differences"] == [0.0] * 5
        assert found["verified"]
    assert first["runs"] == [10, 5, 5]  # prompts are encoded twice a call
    assert second["runs"] == (first["runs"] if kind is StageParallelism.REPLICATED else [0, 0, 0])
    assert beside["runs"] == [0, 0, 0]


def test_a_pipeline_that_is_dropped_takes_the_groups_of_all_its_ranks_along():
    assert on_ranks(3, left_by_a_dropped_pipeline, "qwen_image", **ONE) == [[], [], []]


def test_stages_that_the_user_gave_to_other_ranks_stay_theirs():
    pipe = TINY["flux_dev"].build()
    stages = Composition(family_of(pipe), pipe)
    stages.replace("decoding", Stage())
    stages.work_beside(beside=True)
    stages["text encoding"].parallelism = StageParallelism.REPLICATED
    assert stages["decoding"].parallelism is StageParallelism.REPLICATED
    stages.remove("decoding")
    assert stages["decoding"].parallelism is StageParallelism.BESIDE
    stages.work_beside(beside=False)
    assert stages["decoding"].parallelism is stages["text encoding"].parallelism is StageParallelism.REPLICATED


def _failing(kind: str, rank: int, stage: str, *, listed: bool):
    layout = {**ONE, "timeout": TIMEOUT if kind == "sleep" else 30.0}
    return on_mortal_ranks(3, cases.failing, "qwen_image", layout, kind, rank, stage, listed=listed)
