"""What one rank cannot do to a pipeline no rank has done to it: an error of one while they accelerate is one of all."""

import time
from itertools import product

import pytest

from pipeboost import ParallelConfig
from tests.distributed import binding_cases
from tests.distributed.failure_ranks import on_mortal_ranks
from tests.distributed.layout_cases import is_as_near
from tests.distributed.ranks import on_ranks
from tests.parameters import exhaustive

NAME = "flux_true_cfg"
LAYOUTS = {"cfg": {"cfg": 2}, "weights": {"tensor": 2}}
"""Of these, ranks that share weights talk to each other in between, and to take it back."""
PLANS = {
    "stock": ({}, ParallelConfig(cfg=2), "cfg=2"),
    "shared before": ({"tensor": 2}, ParallelConfig(cfg=2), "cfg=2"),
    "auto": ({}, "auto", "ulysses=2"),
}
FAILURES = [("weights", 0, "transformer"), ("cfg", 1, "scheduler")]
FAILURES += exhaustive(("cfg", 0, "transformer"), ("weights", 1, "scheduler"))
each_failure = pytest.mark.parametrize(("layout", "rank", "path"), FAILURES)


@each_failure
def test_an_error_on_one_rank_while_accelerating_leaves_all_ranks_stock_and_free_to_try_again(layout, rank, path):
    answers = on_ranks(2, binding_cases.fails_while_accelerating, NAME, rank, path, **LAYOUTS[layout])
    _assert_raised([answer["first"] for answer in answers], rank, "accelerate_pipeline")
    for answer in answers:
        assert answer["left"] == {"surroundings": True, "classes": True}
        assert answer["stock"] == 0.0
        assert is_as_near(answer["next"], LAYOUTS[layout], NAME)
        assert answer["end"]


def test_where_a_rank_cannot_have_the_new_acceleration_all_ranks_have_the_old_one_back():
    answers = on_ranks(2, binding_cases.fails_while_accelerating_anew, NAME, 1, {"cfg": 2}, {"tensor": 2})
    _assert_raised([raised for raised, *_ in answers], 1, "accelerate_pipeline")
    assert [rest for _, *rest in answers] == [["cfg=2", 0.0]] * 2


@pytest.mark.parametrize(("rank", "plan"), exhaustive(*product((0, 1), PLANS), but=[(0, "shared before"), (1, "auto")]))
def test_where_one_rank_has_no_plan_all_are_told_why_before_anything_has_changed(rank, plan):
    before, parallel, layout = PLANS[plan]
    started = time.monotonic()
    answers = on_ranks(2, binding_cases.refuses_to_plan, NAME, rank, before, parallel)
    failed, other = answers[rank]["first"], answers[1 - rank]["first"]
    assert failed["raised"] in ("MissingPackageError", "UnsupportedError")
    assert (other["raised"], other["rank"], other["stage"]) == ("RankFailedError", rank, "accelerate_pipeline"), other
    assert failed["text"] in other["text"]
    assert [answer["left"] for answer in answers] == [0.0, 0.0]
    assert [answer["layout"] for answer in answers] == [layout] * 2
    assert all(is_as_near(answer["next"], {layout.split("=")[0]: 2}, NAME) for answer in answers)
    assert time.monotonic() - started < 60


@each_failure
def test_a_component_that_one_rank_cannot_bind_at_the_next_call_ends_it_on_all_and_the_groups_stay(layout, rank, path):
    answers = on_ranks(2, binding_cases.fails_at_the_next_call, NAME, rank, path, **LAYOUTS[layout])
    _assert_raised([answer["refused"] for answer in answers], rank, "the call's start")
    for answer in answers:
        assert answer["stock again"]
        assert answer["same mesh"]
        assert is_as_near(answer["next"], LAYOUTS[layout], NAME)
        assert answer["left"] == 0.0


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_rank_that_is_killed_while_accelerating_is_named(layout):
    started = time.monotonic()
    outcomes = on_mortal_ranks(2, binding_cases.dies_while_accelerating, NAME, 1, **layout)
    told = outcomes[0].answer
    assert (told["raised"], told["rank"], told["signal"]) == ("RankFailedError", 1, "SIGKILL"), told
    assert time.monotonic() - started < 30


def _assert_raised(raised: list, rank: int, stage: str) -> None:
    failed, other = raised[rank], raised[1 - rank]
    assert (failed["raised"], failed["text"]) == ("ValueError", f"boom on rank {rank}"), failed
    assert (other["raised"], other["rank"], other["stage"]) == ("RankFailedError", rank, stage), other
    assert f"ValueError: boom on rank {rank}" in other["text"]


@pytest.mark.parametrize(("rank", "moments"), [(0, [0, 9, 500]), (-1, [1, 40, 200])])
def test_ctrl_c_while_weights_are_split_leaves_them_whole_on_all_ranks(rank, moments):
    for number, found in enumerate(on_ranks(2, binding_cases.interrupted_while_splitting, NAME, rank, moments)):
        here = rank in (-1, number)
        assert found["raised"] == ["KeyboardInterrupt" if here else "RankFailedError"] * len(moments)
        assert all(found["whole"])
        assert is_as_near(found["differences"][0], {"tensor": 2}, NAME)
        assert found["differences"][1] == 0.0


def test_ctrl_c_while_weights_are_joined_waits_until_all_ranks_have_them():
    for rank, found in enumerate(on_ranks(2, binding_cases.interrupted_while_joining, NAME, 0)):
        assert found == {"raised": "KeyboardInterrupt" if rank == 0 else "", "joined": True, "difference": 0.0}
