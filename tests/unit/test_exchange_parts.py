"""In how many parts ranks exchange heads for tokens, by the size of what a rank attends to."""

from types import SimpleNamespace

import pytest
import torch

from pipeboost.contract.call import Call
from pipeboost.features.parallel import ulysses_ring
from pipeboost.features.parallel.sequence_parallel import SHARDS, Shards

CASES = {
    "FLUX at 1024x1024 on four": ((1, 4608, 6, 128), 1, 2),
    "FLUX at 256x256 on four": ((1, 768, 6, 128), 1, 1),
    "FLUX on 24, which leaves a head to each": ((1, 4608, 1, 128), 1, 1),
    "Wan of 81 frames on two": ((1, 32760, 6, 128), 2, 2),
    "FLUX at 1024x1024 on two": ((1, 4608, 12, 128), 1, 2),
    "Qwen-Image at 1024x1024 on two, three rounds of a GPU, halves of two": ((1, 4224, 12, 128), 1, 1),
    "HunyuanVideo of 33 frames on four": ((1, 18420, 6, 128), 2, 2),
    "several images": ((4, 1152, 6, 128), 1, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_two_parts_where_each_fills_the_gpu_and_that_costs_nothing(case):
    sizes, eager, captured = CASES[case]
    assert ulysses_ring._parts(*sizes, 132, launched=False) == eager
    assert ulysses_ring._parts(*sizes, 132, launched=True) == captured


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
