"""Lets sums on a CPU be the same wherever numbers lie, skips what needs a GPU, and orders and quickens the rest.

On some processors MKL adds numbers up in another order where they begin at another place of a cache line. Then two runs
of stock need not be equal to the bit, and no test could ask it of ours.
"""

import atexit
import gc
import os
import re
import shutil
import tempfile
from collections.abc import Generator

# Matrices this small gain nothing from threads, which wait for each other by spinning where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by MKL when it first computes, in processes of tests too. Its other code paths know no such order.
os.environ["MKL_CBWR"] = re.sub(r"^(AUTO|AVX2|AVX512|AVX512_E1)$", r"\1,STRICT", os.environ.get("MKL_CBWR", "AUTO"))
# Inductor believes what this processor says of its vectors, for which it would else build a test in every process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# What tests compile is kept for none but them.
os.environ["PIPEBOOST_HOME"] = tempfile.mkdtemp(prefix="pipeboost-tests-")

import pytest
import torch

atexit.register(shutil.rmtree, os.environ["PIPEBOOST_HOME"], ignore_errors=True)

# The longest files, which come first, so that no worker is left with one at the end; of two neighbours one has ranks.
FIRST = (
    "distributed/test_layouts.py",
    "pipelines/test_acceleration.py",
    "unit/test_compile.py",
    "distributed/test_failing_pipelines.py",
    "distributed/test_state.py",
    "pipelines/test_stages.py",
    "distributed/test_tensor_parallel.py",
    "unit/test_generate_command.py",
    "distributed/test_failures.py",
    "distributed/test_launch.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported out of garbage collections, each of which would walk through almost a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """Leave what a file of tests has left behind out of the next ones' collections, of which some ask for many."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"tests/{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
