"""Lines for whoever runs the server."""

from __future__ import annotations

import contextlib
import sys


def log(line: str) -> None:
    """Write a line to stderr. Where that cannot be written, as to a file on a full disk, the work goes on."""
    with contextlib.suppress(OSError):
        print(f"pipeboost: {line}", file=sys.stderr, flush=True)
