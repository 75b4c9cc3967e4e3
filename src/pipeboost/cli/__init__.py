"""What people run: the `pipeboost` command. Each command is a module of this folder, imported when it is used."""

from __future__ import annotations

import sys

from pipeboost.errors import PipeboostError


def main() -> None:
    """Run the command line; an error a user can make is one line and exit code 2."""
    from pipeboost.cli.app import app

    try:
        app(prog_name="pipeboost")
    except PipeboostError as error:
        print(f"pipeboost: {error}", file=sys.stderr)
        raise SystemExit(2) from None
