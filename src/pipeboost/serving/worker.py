"""The worker's process: `python -m pipeboost.serving.worker FOLDER PARENT`, started by the supervisor alone.

It ends with the process that started it, however that ends, and so do its ranks; that is arranged before anything
large is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from pipeboost.core.user_files import parse_json
from pipeboost.serving.logs import log_to_stderr
from pipeboost.serving.wire import SETTINGS, WorkerSettings, from_json

_PR_SET_PDEATHSIG = 1


def main(folder: Path, parent: int) -> None:
    """Serve one model's jobs.

    Args:
        folder: shared with the server: the settings, and the socket.
        parent: number of the server's process.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before it was asked for
        raise SystemExit(1)
    settings = from_json(WorkerSettings, parse_json((folder / SETTINGS).read_text(), "the worker's settings"))
    log_to_stderr()
    # Which takes seconds; by now the server's death would end it.
    from pipeboost.serving.worker_rank import serve_rank

    if settings.ranks == 1:
        serve_rank(folder, settings)
    else:
        from pipeboost.distributed.launch import launch

        launch(serve_rank, folder, settings, num_gpus=settings.ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
