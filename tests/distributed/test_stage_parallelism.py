"""Ranks share stages as their `StageParallelism` says, and every rank has what comes out, as in stock."""

import pytest
import torch

from pipeboost.stages import StageParallelism
from tests.distributed import stage_cases as cases
from tests.distributed.ranks import on_ranks
from tests.parameters import exhaustive

MAIN, CFG = StageParallelism.MAIN_RANK, StageParallelism.CFG_PARALLEL
TENSOR, REPLICATED = StageParallelism.TENSOR_PARALLEL, StageParallelism.REPLICATED


@pytest.mark.parametrize("name", ["flux_dev", "hunyuan_video", *exhaustive("qwen_image", "wan22_t2v")])
def test_text_is_encoded_on_the_main_rank_alone_and_the_result_is_that_of_stock(name):
    first, second = on_ranks(2, cases.whole_call, name, {"ulysses": 2}, {})
    assert first["difference"] == second["difference"] == 0.0
    assert "text_encoder" in first["worked"]
    assert second["worked"] == {"decoder"}


def test_a_prompt_that_is_reused_on_the_main_rank_is_encoded_nowhere_and_known_everywhere():
    first, second = on_ranks(2, cases.accelerated, "qwen_image", {"cfg": 2})
    assert first["difference"] == second["difference"] == [0.0, 0.0]
    assert first["removed"] == second["removed"] == 0.0
    assert (first["encodings"], second["encodings"]) == (2, 0)
    assert [counts["hits"] for counts in first["reuse"]] == [0, 2]
    assert second["reuse"] == [{}, {}]


@pytest.mark.parametrize("name", ["wan21_i2v", "qwen_image_edit", *exhaustive("flux_img2img")])
def test_every_stage_that_returns_its_work_can_run_on_the_main_rank_alone(name):
    shared = dict.fromkeys(cases.shareable(name), MAIN)
    first, second = on_ranks(2, cases.whole_call, name, {"tensor": 2}, shared)
    assert first["difference"] == second["difference"] == 0.0
    assert {"text_encoder", "decoder"} <= first["worked"]
    assert not second["worked"]
    assert torch.equal(first["generator"], second["generator"])
    assert torch.equal(first["global"], second["global"])


def test_the_ranks_of_each_guidance_branch_run_a_stage_in_turn():
    found = on_ranks(4, cases.whole_call, "qwen_image", {"cfg": 2, "ulysses": 2}, {"text encoding": CFG})
    assert [each["difference"] for each in found] == [0.0] * 4
    assert all("text_encoder" in each["worked"] for each in found)


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_what_a_door_returns_has_the_kind_shape_and_dtype_of_stock_on_every_rank(name):
    for found in on_ranks(4, cases.encoded, name, {"cfg": 2, "ring": 2}):
        assert found["facts"] == found["of stock"]
        assert all(found["equal"])


RUNS = {
    (REPLICATED, 1): [1, 1, 1, 1],
    (MAIN, 1): [1, 0, 0, 0],
    (CFG, 1): [1, 1, 0, 0],
    (CFG, 3): [2, 2, 1, 1],
    (TENSOR, 1): [1, 1, 1, 1],
}


@pytest.mark.parametrize(("kind", "times"), RUNS, ids=str)
def test_a_stage_runs_where_it_says_and_leaves_every_rank_the_same(kind, times):
    found = on_ranks(4, cases.user_stage, kind, {"cfg": 2, "tensor": 2}, times)
    assert [each["runs"] for each in found] == RUNS[kind, times]
    for each in found:
        assert torch.equal(each["own"], found[0]["own"])
        assert each["next"] == found[0]["next"]
        assert each["stride"] == (1, 3)
        assert each["values"]["plain"] == [{"a": (1, "x", None)}, each["own"].tolist()]
        for name in ("latents", "flags", "half", "empty"):
            assert each["values"][name].dtype == found[0]["values"][name].dtype
            assert torch.equal(each["values"][name], found[0]["values"][name])


def test_it_is_the_same_as_on_one_rank():
    alone = on_ranks(1, cases.user_stage, MAIN, {})[0]
    for kind in (MAIN, CFG):
        for each in on_ranks(2, cases.user_stage, kind, {"cfg": 2}):
            assert torch.equal(each["own"], alone["own"])
            assert each["next"] == alone["next"]
            assert torch.equal(each["values"]["latents"], alone["values"]["latents"])


FAILURES = {
    "raises": ("ZeroDivisionError", "on purpose"),
    "raises what has no pickle": ("Odd", "on purpose"),
    "returns what has no pickle": ("PipeboostError", "the outcome of stage 'failing' cannot be sent to other ranks"),
    "fails its check": ("StageVerificationError", "output of stage 'failing': images="),
}


@pytest.mark.parametrize("how", FAILURES)
def test_what_the_main_rank_raises_is_raised_on_every_rank_and_the_next_call_works(how):
    first, *others = on_ranks(2, cases.failing, how, {"cfg": 2})
    kind, words = FAILURES[how]
    assert first[0] == kind
    assert words in first[1]
    for other in others:
        if how == "raises what has no pickle":
            assert other[:2] == ["PipeboostError", "Odd on rank 0: on purpose"]
        else:
            assert other == first
    assert {each[-1] for each in (first, *others)} == {"True"}


@pytest.mark.parametrize("stage", ["text encoding", "decoding"])
@pytest.mark.parametrize(("kind", "runs"), [(MAIN, [1, 0]), (REPLICATED, [1, 1])], ids=str)
def test_a_replacement_may_do_the_stock_work_wherever_it_runs(stage, kind, runs):
    found = on_ranks(2, cases.replaced, stage, kind, own_work=False)
    assert [difference for difference, _ in found] == [0.0, 0.0]
    assert [ran for _, ran in found] == runs


def test_a_replacement_with_work_of_its_own_gives_every_rank_what_the_script_expects():
    found = on_ranks(2, cases.replaced, "decoding", MAIN, own_work=True)
    assert found[0][0] == found[1][0] > 0.0


def test_sharing_weights_needs_ranks_that_share_them():
    for words in on_ranks(2, cases.refused, {"ulysses": 2}):
        assert words.startswith("UnsupportedError: stage 'together' asks for StageParallelism.TENSOR_PARALLEL")
        assert "use ParallelConfig(tensor=2) or more, or StageParallelism.MAIN_RANK" in words
    assert on_ranks(2, cases.refused, {"tensor": 2}) == ["it ran", "it ran"]
