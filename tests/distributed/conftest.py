"""Tests with ranks that live on go to the worker that has that many of them, so that no worker starts all of them."""

import inspect
import multiprocessing
import re

import pytest

from pipeboost.distributed import launch
from tests.distributed.layouts import LAYOUTS, ranks_of


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/distributed" in item.nodeid and hasattr(item.module, "on_ranks"):
            item.add_marker(pytest.mark.xdist_group(f"{_ranks_of(item)} ranks"))


def _ranks_of(item: pytest.Function) -> int:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if isinstance(parameters.get("layout"), str) and parameters["layout"] in LAYOUTS:
        return ranks_of(LAYOUTS[parameters["layout"]])
    if "ranks" in parameters:
        return parameters["ranks"]
    return max(map(int, re.findall(r"on_ranks\((\d)", inspect.getsource(item.function))), default=2)


@pytest.fixture
def quick_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of `launch` begin as those of the tests do, with everything imported, where each would import it anew."""
    start = launch.start_processes
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.distributed.preloaded"])
    monkeypatch.setattr(
        launch, "start_processes", lambda *args, **kwargs: start(*args, **{**kwargs, "start_method": "forkserver"})
    )
