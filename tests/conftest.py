"""Lets sums on a CPU be the same wherever numbers lie, and skips what needs a GPU, with a reason, where there is none.

On some processors MKL adds numbers up in another order where they begin at another place of a cache line. Then two runs
of stock need not be equal to the bit, and no test could ask it of ours.
"""

import os
import re

# Read by MKL when it first computes, in processes of tests too. Its other code paths know no such order.
os.environ["MKL_CBWR"] = re.sub(r"^(AUTO|AVX2|AVX512|AVX512_E1)$", r"\1,STRICT", os.environ.get("MKL_CBWR", "AUTO"))

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
