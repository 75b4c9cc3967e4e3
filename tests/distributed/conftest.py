"""Tests with several ranks run one after another, in one worker, so that they share their processes."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/distributed" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("ranks"))
