"""Meshes and groups on real processes."""

import pytest
import torch

from tests.distributed import group_cases
from tests.distributed.ranks import on_ranks


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}, {"ulysses": 2, "ring": 2}], ids=str)
def test_collectives_bring_what_the_ranks_have(degrees):
    size = degrees.get("ulysses", 1) * degrees.get("ring", 1)
    for found in on_ranks(size, group_cases.collectives, degrees):
        rank = found["rank"]
        assert found["sum"].tolist() == [sum(range(size)), size]
        assert found["gathered"][0, :, 0].tolist() == [float(r) for r in range(size) for _ in range(r + 2)]
        expected = [
            100.0 * other + offset
            for other in range(size)
            for offset in range(rank * (other + 1), (rank + 1) * (other + 1))
        ]
        assert found["parcels"].tolist() == expected
        assert found["incoming"].tolist() == [float((rank - 1) % size)] * 3
        assert found["announced"].tolist() == [float(size - 1)] * 2
        assert [item["rank"] for item in found["objects"]] == list(range(size))
        assert [item["text"] for item in found["objects"]] == ["x" * r for r in range(size)]


def test_tensor_ranks_are_neighbours_and_cfg_ranks_far():
    found = on_ranks(4, group_cases.places, {"cfg": 2, "tensor": 2})
    assert [place["tensor"][1] for place in found] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [place["cfg"][1] for place in found] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [place["main"] for place in found] == [True, False, False, False]


def test_replicas_have_their_own_samples():
    found = on_ranks(4, group_cases.places, {"replicas": 2, "ulysses": 2})
    assert [place["sequence"] for place in found] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [place["main"] for place in found] == [True, False, True, False]


def test_all_reduce_gives_all_ranks_the_same_bits():
    results = on_ranks(4, group_cases.collectives, {"ulysses": 4})
    assert all(torch.equal(found["sum"], results[0]["sum"]) for found in results)


def test_a_rank_that_comes_alone_is_told_who_did_not():
    alone, other = on_ranks(2, group_cases.coming_alone)
    assert "rank 1 did not come to accelerate_pipeline within 1 s" in alone
    assert other == ""
    assert [place["main"] for place in on_ranks(2, group_cases.places, {"ulysses": 2})] == [True, False]
