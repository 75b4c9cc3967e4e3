"""Heads and tokens that ranks write into each other's memory: four ranks on one GPU, eagerly and from CUDA graphs."""

import pytest

from tests.distributed.failure_ranks import on_mortal_ranks
from tests.gpu import peer_gpu_cases as cases

pytestmark = pytest.mark.gpu
# Of FLUX at 1024x1024, of a short text in few tokens, and of what divides by nothing.
SIZES = [
    (1, [1152] * 4, 24, 128, "bfloat16"),
    (2, [301, 300, 300, 300], 12, 64, "bfloat16"),
    (1, [5, 5, 5, 4], 12, 24, "float32"),
]


def test_attention_across_four_ranks_is_that_of_one_in_any_number_of_parts():
    given = [(*size, parts) for size in SIZES for parts in (1, 2, 3)]
    (outcome,) = on_mortal_ranks(1, cases.exchanges, given, limit=150.0, start="spawn")
    assert outcome.answer is not None, outcome.printed
    for case, found in zip(given, outcome.answer, strict=True):
        print(case, found)
        assert found["moved"]
        assert found["replayed"]
        assert found["alike"]
        assert found["error"] < (0.01 if "bfloat16" in case else 1e-5), case


def test_after_attention_that_failed_on_all_ranks_the_next_exchange_is_right():
    (outcome,) = on_mortal_ranks(1, cases.after_errors, limit=100.0, start="spawn")
    assert outcome.answer == {"at once": [True] * 4, "captured": [True] * 4}, outcome.printed
