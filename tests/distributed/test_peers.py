"""Exchanges of heads for tokens that ranks write into each other's memory, on CPUs by Triton's interpreter."""

import pytest

from tests.distributed import peer_cases
from tests.distributed.failure_ranks import on_mortal_ranks

pytest.importorskip("triton", reason="the kernels are Triton's")


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_and_tokens_arrive_where_they_belong(ranks, tmp_path):
    cases = [
        (1, [3] * ranks, ranks, 8, "float32"),
        (2, [3 - (rank > 0) for rank in range(ranks)], 2 * ranks, 12, "bfloat16"),
        (3, [1] * ranks, 3 * ranks, 4, "float16"),
    ]
    for outcome in on_mortal_ranks(ranks, peer_cases.exchanges, str(tmp_path), cases):
        assert outcome.answer == [True] * len(cases), outcome.printed


def test_where_memory_cannot_be_shared_all_ranks_are_told_why(tmp_path):
    for outcome in on_mortal_ranks(2, peer_cases.refusals, str(tmp_path)):
        assert outcome.answer == [
            "a GPU has no room",
            "a GPU does not reach another's memory: no access",
            "what one GPU wrote into another's memory did not arrive",
        ], outcome.printed
