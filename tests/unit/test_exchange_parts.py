"""In how many parts ranks exchange heads for tokens, by the size of what a rank attends to."""

from types import SimpleNamespace

import pytest
import torch

from pipeboost.parallel import attend

CASES = {
    "FLUX at 1024x1024 on four": ((1, 4608, 6, 128), 1, 2),
    "FLUX at 256x256 on four": ((1, 768, 6, 128), 1, 1),
    "FLUX on 24, which leaves a head to each": ((1, 4608, 1, 128), 1, 1),
    "Wan of 81 frames on two": ((1, 32760, 6, 128), 2, 2),
    "several images": ((4, 1152, 6, 128), 1, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_two_parts_where_each_fills_the_gpu_and_the_host_has_the_time(case, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132), raising=True
    )
    sizes, eager, captured = CASES[case]
    device = torch.device("cuda")
    assert attend._parts(*sizes, device, launched=False) == eager
    assert attend._parts(*sizes, device, launched=True) == captured
