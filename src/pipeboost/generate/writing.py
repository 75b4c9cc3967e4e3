"""Files that are whole or not there, and the names that outputs get."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import textwrap
from collections.abc import Collection
from pathlib import Path

from pipeboost.core.errors import ConfigurationError, PipeboostError
from pipeboost.core.user_files import user_path


def write_whole(path: Path, content: bytes, *, new: bool = False) -> Path:
    """Write to a temporary file in the folder of `path` and rename it, so that no half of a file is ever seen.

    Args:
        new: replace no file, whoever writes there too: where the name is taken, the next free number is put after it.

    Returns:
        Where it is.

    Raises:
        PipeboostError: the folder cannot be made, or the file cannot be written, as on a full disk; nothing is left.
    """
    # A link stays one, and what is no file, such as /dev/null, is written to and not replaced.
    target = path if new else Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem[:40]}-{secrets.token_hex(4)}.part")
    left = []
    try:
        if not new and target.exists() and not target.is_file():
            target.write_bytes(content)
            return path
        target.parent.mkdir(parents=True, exist_ok=True)
        left.append(temporary)
        with temporary.open("xb") as file:
            file.write(content)
        if new:
            path = target = _reserved(path)
            left.append(path)
        os.replace(temporary, target)
        left.clear()
        return path
    except OSError as error:
        raise PipeboostError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        for each in left:
            with contextlib.suppress(OSError):
                each.unlink()


def _reserved(path: Path) -> Path:
    """The first free name, which from now on is an empty file of ours."""
    each, number = path, 1
    while True:
        try:
            each.touch(exist_ok=False)
            return each
        except FileExistsError:
            number += 1
            each = path.with_name(f"{path.stem}-{number}{path.suffix}")


def output_path(given: str | os.PathLike[str], formats: Collection[str], what: str = "path") -> tuple[Path, bool]:
    """What a path for outputs names, and whether that is a file; else it is a folder.

    A folder is one already, has no suffix, or ends in a separator.

    Args:
        formats: suffixes that a file may have.

    Raises:
        ConfigurationError: a file of another kind, or no path.
    """
    target = user_path(given, what)
    separators = tuple(filter(None, (os.sep, os.altsep)))
    if target.is_dir() or not target.suffix or os.fspath(given).endswith(separators):
        return target, False
    if target.suffix.lower() not in formats:
        raise ConfigurationError(f"{what} {target} must be a folder or a file that ends in {', '.join(formats)}")
    return target, True


def output_name(prompt: str, seed: int) -> str:
    """What an output is called that was given no name, without a suffix."""
    words = " ".join(re.findall(r"\w+", prompt.lower()))
    return f"{textwrap.shorten(words, 48, placeholder='').replace(' ', '-') or 'output'}-seed{seed}"
