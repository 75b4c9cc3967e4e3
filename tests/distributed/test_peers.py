"""Exchanges of heads for tokens that ranks write into each other's memory, on CPUs by Triton's interpreter."""

import functools
from types import SimpleNamespace

import pytest
import torch

from pipeboost.distributed import Group, Peers
from pipeboost.distributed.collectives import groups
from pipeboost.distributed.collectives.symmetric_buffers import rounded
from pipeboost.distributed.collectives.symmetric_connect import MOST_BYTES
from pipeboost.distributed.failure.collective_wait import Operations
from pipeboost.distributed.failure.records import Ended, in_step
from tests.distributed import peer_cases
from tests.distributed.failure_ranks import on_mortal_ranks
from tests.parameters import exhaustive

pytest.importorskip("triton", reason="the kernels are Triton's")


@pytest.mark.parametrize("ranks", [3, *exhaustive(2, 4)])
def test_heads_and_tokens_arrive_where_they_belong(ranks, tmp_path):
    cases = [
        (1, [3] * ranks, ranks, 8, "float32", 1),
        (2, [3 - (rank > 0) for rank in range(ranks)], 2 * ranks, 12, "bfloat16", 1),
        (2, [3 - (rank > 0) for rank in range(ranks)], 2 * ranks, 12, "bfloat16", 2),
        (3, [1] * ranks, 3 * ranks, 4, "float16", 3),
        (1, [4] * ranks, 3 * ranks, 8, "float16", 2),
        # More than a program sends at a time, and more of that than there are programs.
        (1, [20 - (rank > 1) for rank in range(ranks)], 2 * ranks, 64, "bfloat16", 1),
        (1, [20 - (rank > 1) for rank in range(ranks)], 2 * ranks, 64, "bfloat16", 2),
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


@pytest.mark.parametrize("parts", [1, 2])
def test_a_rank_that_fails_in_attention_is_out_of_step_with_one_that_did_not_come_to_it(parts):
    """It has met the others for its heads, which they have not: such groups are not used again."""

    class OneRank(Peers):
        _send_heads = _barrier = lambda *_, **__: None

        def _heads(self, q, *_):
            return q, q, q

    progress = [Operations() for _ in range(2)]
    group = SimpleNamespace(name="two ranks", rank=0, size=2, ranks=(0, 1), device="cpu", operations=progress[0])
    size = rounded(1)
    mine = OneRank(group, (size, size), torch.zeros(256 + 2 * size, dtype=torch.uint8), [0, 0])
    q = torch.zeros(1, 4, 4, 8)
    with pytest.raises(torch.OutOfMemoryError):
        mine.attended(q, q, q, [4, 4], functools.partial(peer_cases._raise, torch.OutOfMemoryError()), parts=parts)
    assert not in_step({rank: Ended(call=1, counts=dict(progress[rank].counts)) for rank in range(2)})


def test_memory_grows_in_strides_up_to_a_limit_and_each_size_stays_with_its_own(monkeypatch):
    made = []

    def connect(_, heads_bytes, tokens_bytes, *__):
        made.append(SimpleNamespace(heads_bytes=rounded(heads_bytes), tokens_bytes=rounded(tokens_bytes)))
        return made[-1]

    monkeypatch.setattr(groups, "connect", connect)
    group = object.__new__(Group)  # of two GPUs
    group.size, group.device, group.unreachable, group.backend = 2, "cuda", None, None
    group._peers, group.name = [], "two GPUs"
    device = torch.device("cpu")
    first = group.peers(2**24, 2**22, device)
    assert (first.heads_bytes, first.tokens_bytes) == (2**24, 2**22)
    assert group.peers(2**20, 2**22, device) is first
    sizes = [group.peers(2**24 + 3072 * tokens, 2**22 + 768 * tokens, device).heads_bytes for tokens in range(1, 600)]
    assert len(made) == 2  # not 600
    assert sizes == [made[1].heads_bytes] * 599
    assert made[1].heads_bytes >= 9 * 2**21
    # By itself it would be within the limit, a little.
    assert group.peers((MOST_BYTES - 2**25) * 8 // 9, 2**20, device) is None
    assert group.unreachable is None  # what is smaller goes on as before
    assert group.peers(2**24, 2**22, device) is first  # of which a CUDA graph may be replayed elsewhere
