"""What the server writes down: a JSON object a line, without prompts, paths and tracebacks."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from pathlib import PurePath

LOG = logging.getLogger("pipeboost.serving")
REQUESTS = logging.getLogger("pipeboost.serving.requests")
_FRAMES = 6


def trail(error: BaseException) -> str:
    """Return where an error was raised: its type, and the innermost lines of code, by names of files alone.

    What it says is left out, for libraries put into it what they were given.
    """
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    lines = " < ".join(f"{PurePath(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {lines or 'an unknown place'}"


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, message, and the fields that the record was given."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        shown = {"time": f"{when}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        if message := record.getMessage():
            shown["message"] = message
        if record.exc_info and record.exc_info[1] is not None:
            shown["error"] = trail(record.exc_info[1])
        return json.dumps(shown | fields, default=str)


def log_to_stderr() -> None:
    """Have this process log to stderr, the server's own records and those of its libraries that are warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOG.setLevel(logging.INFO)
