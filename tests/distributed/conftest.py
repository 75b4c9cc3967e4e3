"""Launches that are quick where how ranks start is not what is tested."""

import multiprocessing

import pytest
import torch
import torch.multiprocessing


@pytest.fixture
def quick_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of `launch` begin as those of the tests do, with everything imported, where each would import it anew."""
    forkserver = torch.multiprocessing.get_context("forkserver")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.distributed.preloaded"])
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: forkserver)
