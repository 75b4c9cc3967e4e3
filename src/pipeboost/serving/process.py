"""The HTTP process: puts its rooms together, and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from pipeboost.core.errors import PipeboostError
from pipeboost.core.user_files import make_folder
from pipeboost.serving.jobs import Paths
from pipeboost.serving.logs import LOG, log_to_stderr
from pipeboost.serving.parts import Parts
from pipeboost.serving.server import bound, serve
from pipeboost.serving.service import Service
from pipeboost.serving.settings import Settings, load


def service_of(settings: Settings) -> Service:
    """Return the service of these settings.

    Raises:
        ConfigurationError: another server has the data folder, it cannot be used, or `--upload` names no store.
    """
    from pipeboost.serving import media  # type: ignore[attr-defined, unused-ignore]
    from pipeboost.serving.order import Order  # type: ignore[import-not-found, unused-ignore]
    from pipeboost.serving.retention import Retention  # type: ignore[import-not-found, unused-ignore]
    from pipeboost.serving.store import JobStore, new_id  # type: ignore[import-not-found, unused-ignore]
    from pipeboost.serving.supervisor import Supervisor, WorkerSettings  # type: ignore[import-not-found, unused-ignore]
    from pipeboost.serving.upload import check_prefix, put  # type: ignore[import-not-found, unused-ignore]

    paths = Paths(settings.data_dir)
    if settings.upload:
        check_prefix(settings.upload)
    store = JobStore(paths)
    worker = WorkerSettings(
        model_path=settings.model_path,
        vae_path=settings.vae_path,
        device=settings.device,
        acceleration=settings.acceleration,
        ranks=settings.ranks,
        lora_dir=None if settings.lora_dir is None else str(settings.lora_dir),
        lora_memory=settings.lora_memory,
        warm_sizes=tuple(tuple(map(int, size.split("x"))) for size in settings.warm_sizes),
    )
    retention = Retention(store, paths, seconds=settings.retention, budget=int(settings.disk_budget * 2**30))
    parts = Parts(
        store=store,
        order=Order(settings.policy),
        worker=Supervisor(worker, paths, step_timeout=settings.step_timeout, start_timeout=settings.start_timeout),
        media=media,
        new_id=new_id,
        upload=put,
        clean=lambda: retention.sweep(time.time()),
    )
    return Service(parts, settings, paths)


async def run(settings: Settings) -> None:
    """Serve until the process is told to stop.

    Raises:
        PipeboostError: something cannot be had, or the worker refuses its model.
    """
    make_folder(settings.data_dir, f"--data-dir {settings.data_dir}")
    with contextlib.closing(bound(settings)) as listening:
        await serve(service_of(settings), settings, listening)


def main() -> int:
    """Run the HTTP process; exit codes as the command's: 2 for mistakes of the user, 3 for an internal error."""
    path = Path(sys.argv[1])
    log_to_stderr()
    try:
        settings = load(path)
        path.unlink()  # it may hold keys
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        asyncio.run(run(settings))
    except PipeboostError as error:
        print(f"pipeboost: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        LOG.exception("the server has failed")
        return 3
    return 0
