"""Lets sums on a CPU be the same wherever numbers lie, and skips what needs a GPU, with a reason, where there is none.

On some processors MKL adds numbers up in another order where they begin at another place of a cache line. Then two runs
of stock need not be equal to the bit, and no test could ask it of ours.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # read by MKL when it first computes, in processes of tests too

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
