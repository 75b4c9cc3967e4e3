"""Launches that are quick where how ranks start is not what is tested."""

import multiprocessing

import pytest

from pipeboost.distributed import launch


@pytest.fixture
def quick_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of `launch` begin as those of the tests do, with everything imported, where each would import it anew."""
    start = launch.start_processes
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.distributed.preloaded"])
    monkeypatch.setattr(
        launch, "start_processes", lambda *args, **kwargs: start(*args, **{**kwargs, "start_method": "forkserver"})
    )
