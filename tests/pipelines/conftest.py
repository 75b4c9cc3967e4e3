"""Makes `tests.pipelines.tiny` importable however pytest was started, and keeps the tests of a file together."""

import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of one file share the outputs of stock, and Dynamo's graphs: they go to one worker."""
    for item in items:
        if "tests/pipelines" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
