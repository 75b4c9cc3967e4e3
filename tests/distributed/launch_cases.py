"""What the ranks run in `test_launch`."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

import pipeboost
from pipeboost.cli import generate
from pipeboost.core.errors import ConfigurationError
from pipeboost.distributed import Mesh, watched, world
from tests.distributed.failure_cases import Trouble, script


def greeting(word: str, *, mark: str = "!") -> dict[str, Any]:
    """Who this rank is, and the sum of all ranks' numbers."""
    here = world()
    mesh = Mesh({"ulysses": here.size}, device=torch.device("cpu"))
    with watched(mesh, stage=lambda: "greeting", timeout=10):
        total = mesh.group("ulysses").all_reduce(torch.tensor([here.rank + 1.0]))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    return {"word": word + mark, "total": total, **{name: os.environ[name] for name in names}}


def failing(kind: str, rank: int, place: str) -> None:
    """A watched call in which one rank fails."""
    script(Mesh({"ulysses": world().size}, device=torch.device("cpu")), Trouble(kind, rank, place))


def failing_outside() -> None:
    """Rank 1 raises outside all calls while rank 0 sleeps."""
    if world().rank == 0:
        time.sleep(600)
    raise ValueError("boom outside")


def launching(folder: str) -> None:
    """Launch ranks that stay; this process can be told to end as from a keyboard."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipeboost.launch(sleeping, folder, num_gpus=2)


def sleeping(folder: str) -> None:
    """Leave word of this process, and stay."""
    Path(folder, f"{world().rank}.new").write_text(str(os.getpid()))
    Path(folder, f"{world().rank}.new").rename(Path(folder, str(world().rank)))
    time.sleep(600)


def refusing(alone: int) -> None:
    """`pipeboost generate` on a rank: one refuses, or all do where `alone` is -1; the others load for long."""

    def run_generate(*_: Any, **__: Any) -> None:
        if alone in (-1, world().rank):
            raise ConfigurationError("width=100 cannot be")
        time.sleep(600)

    generate.run_generate = run_generate
    generate._on_rank(None, {})
