"""In how many parts ranks exchange heads for tokens, by the size of what a rank attends to."""

from types import SimpleNamespace

import torch

from pipeboost.contract.call import Call
from pipeboost.features.parallel import ulysses_ring
from pipeboost.features.parallel.sequence_parallel import SHARDS, Shards


def test_once_a_size_was_captured_it_is_exchanged_in_two_parts_where_it_runs_eagerly_too(monkeypatch):
    """Another rank may replay what this one runs."""
    found = []

    def attended(q, *_, parts):
        found.append(parts)
        return q

    peers = SimpleNamespace(multiprocessors=132, launched=set(), attended=attended)
    groups = {
        "ulysses": SimpleNamespace(size=4, rank=0, peers=lambda *_: peers),
        "ring": SimpleNamespace(size=1, rank=0),
    }
    call = Call(None, None, {})
    call.mesh = SimpleNamespace(group=groups.get)
    monkeypatch.setattr(ulysses_ring, "current_call", lambda: call)
    served = SimpleNamespace(attend=None)
    across = ulysses_ring.UlyssesRing()
    monkeypatch.setattr(across, "_attend", lambda: served)

    def run(tokens, *, captures=False):
        call.captures = captures
        call[SHARDS] = Shards(4, 0, image=tokens, text=512)
        q = torch.empty(1, (tokens + 512) // 4, 24, 128, device="meta")
        across.run(q, q, q, None, None)

    run(4096)
    run(4096, captures=True)
    run(4096)
    run(5120)
    assert found == [1, 2, 2, 1]
