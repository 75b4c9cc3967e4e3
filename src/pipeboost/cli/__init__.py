"""What people run: the `pipeboost` command. Each command is a module of this folder, imported when it is used."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

from pipeboost.core.errors import PipeboostError, RankFailedError, one_line, shortened

STOPPED = 130
"""The exit code of what Ctrl-C has ended."""


def main() -> None:
    """Run the command line. Whatever goes wrong is one line on stderr.

    Exit codes: 2 for mistakes of the user, 3 for an internal error, whose traceback is in a file that the line names,
    130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    usage_error: Any = ()
    try:
        with _stopped_at_once():
            import_module("pipeboost.acceleration")  # which takes seconds, and every command needs it
            import typer

            from pipeboost.cli.app import app
        usage_error = typer.BadParameter.__base__  # Typer exports this one; its base is that of them all
        try:
            code = app(prog_name="pipeboost", standalone_mode=False) or 0
        except typer.Abort:  # which versions of Typer make of Ctrl-C
            code = STOPPED
        finally:
            sys.stdout.flush()
        if code == STOPPED:
            _print_error("stopped")
        raise SystemExit(code)
    except usage_error as error:
        if not (text := shortened(error.format_message())):  # the help was shown
            raise SystemExit(2) from None
        _fail(text, "", 2)
    except RankFailedError as error:
        trace = error.traceback
        _fail(str(error).partition("\n")[0], trace, 3 if trace or error.signal else 2)
    except PipeboostError as error:
        _fail(str(error), "", 2)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE):
            # Nothing that is left in the stream's buffer may fail again as the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if error.errno == errno.EPIPE:  # whoever read it has seen enough
                raise SystemExit(1) from None
            _fail(f"the output cannot be written: {error.strerror}", "", 2)
        _fail(f"{type(error).__name__}: {one_line(error)}", "".join(traceback.format_exception(error)), 3)


def _fail(line: str, trace: str, code: int) -> NoReturn:
    where = ""
    if trace:
        try:
            with tempfile.NamedTemporaryFile("w", prefix="pipeboost-", suffix=".txt", delete=False) as file:
                file.write(trace)
            where = f" (please report it; the traceback is in {file.name})"
        except OSError:
            line = f"{line}\n{trace}"
    _print_error(line + where)
    raise SystemExit(code) from None


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"pipeboost: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process: libraries that are being imported make other errors of KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        _print_error("stopped")
        os._exit(STOPPED)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
