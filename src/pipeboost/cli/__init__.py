"""What people run: the `pipeboost` command. Each command is a module of this folder, imported when it is used."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from pipeboost.core.errors import PipeboostError

STOPPED = 130
"""The exit code of what Ctrl-C has ended."""


def main() -> None:
    """Run the command line; an error a user can make is one line and exit code 2, Ctrl-C one line and 130."""
    with _stopped_at_once():
        import_module("pipeboost.acceleration")  # which takes seconds, and every command needs it
        from pipeboost.cli.app import app
    try:
        app(prog_name="pipeboost")
    except PipeboostError as error:
        print(f"pipeboost: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as ended:
        # A command that has something to keep tells so by itself.
        if isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):
            print("pipeboost: stopped", file=sys.stderr)
        raise


@contextlib.contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process: libraries that are being imported make other errors of KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        sys.stderr.write("pipeboost: stopped\n")
        sys.stderr.flush()
        os._exit(STOPPED)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
