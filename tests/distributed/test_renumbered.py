"""A store that numbers torch's exchanges anew, asked from Python and, through a prefix, from C++ as torch does."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.collectives.symmetric_connect import Renumbered


@contextlib.contextmanager
def patient() -> Iterator[Callable[[], None]]:
    yield lambda: None


@pytest.fixture(params=["python", "c++"])
def ranks(request):
    """The stores of two ranks."""
    both = dist.HashStore()
    stores = [Renumbered(both, patient) for _ in range(2)]
    asked = stores if request.param == "python" else [dist.PrefixStore("group", store) for store in stores]
    yield asked
    del stores  # which asking from C++ does not keep


def exchange(store, number, rank, value):
    """What torch does: each rank writes its own value and waits for those of the others."""
    store.set(f"CUDASymmetricMemory/{number}/{rank}", value)
    other = f"CUDASymmetricMemory/{number}/{1 - rank}"
    store.wait([other])
    return store.get(other), store.multi_get([other])


def on_both(ranks, run):
    """What `run(store, rank)` returns on each."""
    found = {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: run(ranks[rank], rank)}), daemon=True)
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


def test_ranks_that_count_otherwise_hear_each_other(ranks):
    def run(store, rank):
        return [exchange(store, (7, 0)[rank] + turn, rank, b"%d\x00\xff%d" % (rank, turn)) for turn in range(3)]

    for rank, answers in on_both(ranks, run).items():
        assert answers == [(value, [value]) for value in (b"%d\x00\xff%d" % (1 - rank, turn) for turn in range(3))]


def test_they_meet_at_barriers_too_which_count_along(ranks):
    def run(store, rank):
        first = (7, 0)[rank]
        heard = exchange(store, first, rank, b"before")
        store.barrier(f"CUDASymmetricMemory/{first + 1}", 2, timedelta(seconds=9))
        return heard, exchange(store, first + 2, rank, b"after")

    expected = ((b"before", [b"before"]), (b"after", [b"after"]))
    assert on_both(ranks, run) == {0: expected, 1: expected}


def test_keys_without_a_number_stay(ranks):
    ranks[0].set("name", b"x")
    assert ranks[1].get("name") == b"x"
    assert not ranks[1].check(["another"])


@pytest.mark.parametrize("caller", [lambda store: store, lambda store: dist.PrefixStore("group", store)])
def test_a_wait_ends_where_another_rank_has_failed(caller):
    looks = []

    @contextlib.contextmanager
    def failing():
        def check():
            looks.append(1)
            if len(looks) == 3:
                raise PipeboostError("rank 1 has gone")

        yield check

    store = Renumbered(dist.HashStore(), failing)
    with pytest.raises(PipeboostError, match="rank 1 has gone"):
        caller(store).wait(["CUDASymmetricMemory/4/1"])
