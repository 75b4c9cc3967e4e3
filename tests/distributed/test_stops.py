"""What ends a call early on one rank ends it on all, at the same step, and the next call has the same groups."""

import pytest
import torch

from tests.distributed import stop_cases
from tests.distributed.ranks import on_ranks
from tests.distributed.stop_cases import STEPS
from tests.parameters import exhaustive

NAME = "flux_true_cfg"
LAYOUT = {"cfg": 2}


@pytest.mark.parametrize("rank", [0, *exhaustive(1)])
def test_a_cancel_on_one_rank_ends_the_call_on_all_at_the_same_step(rank):
    first, second = on_ranks(2, stop_cases.cancelled, NAME, rank, 2, **LAYOUT)
    assert first["first"] == second["first"]
    assert str(first["first"]).startswith("the call was cancelled after step")
    assert max(first["steps"]) == max(second["steps"]) <= 4
    assert first["second"] == second["second"] == 0.0


def test_a_cancel_that_comes_with_the_last_step_comes_too_late_on_every_rank():
    for found in on_ranks(2, stop_cases.cancelled, NAME, 1, STEPS, **LAYOUT):
        assert found["first"] == found["second"] == 0.0


@pytest.mark.parametrize("name", [NAME, "wan21_t2v", *exhaustive("qwen_image")])
def test_where_the_callback_of_one_rank_interrupts_the_script_all_stop_where_stock_does(name):
    assert on_ranks(2, stop_cases.interrupted_by_a_callback, name, 1, 1, **LAYOUT) == [0.0, 0.0]


@pytest.mark.parametrize("rank", [1, *exhaustive(0)])
def test_an_interrupt_from_outside_on_one_rank_stops_all_at_the_same_step(rank):
    first, second = on_ranks(2, stop_cases.interrupted_from_outside, NAME, rank, 2, **LAYOUT)
    assert torch.equal(first["latents"], second["latents"])
    assert first["steps"] == second["steps"] <= 4
    assert first["second"] == second["second"] == 0.0


def test_requests_run_in_order_on_all_ranks_and_each_is_cancelled_or_refused_by_itself():
    for found in on_ranks(2, stop_cases.submitted, NAME, 1, **LAYOUT):
        assert found == {"found": [0.0, "Cancelled", "DisagreementError", 0.0], "after": 0.0}
