"""The folder in which pipeboost keeps what it compiled: the user's own, for code is loaded from it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

HOME_VARIABLE = "PIPEBOOST_HOME"
"""Where all that pipeboost keeps is; `~/.cache/pipeboost` without it."""


@functools.cache
def compiled_folder() -> Path:
    """Return the folder for compiled code, made where it is missing.

    Where others could write there, one warning says so, and it is another one, for this process alone.
    """
    folder = kept_in(os.environ)
    try:
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = why_not_own(folder)
    except OSError as error:
        reason = f"it cannot be made: {error.strerror}"
    if reason is None:
        return folder
    warnings.warn(
        f"compiled code is not kept in {folder}: {reason}; make it yours alone (chmod 700), or set {HOME_VARIABLE}",
        stacklevel=2,
    )
    temporary = Path(tempfile.mkdtemp(prefix="pipeboost-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def kept_in(environment: Mapping[str, str]) -> Path:
    """Return where compiled code is kept by the environment, whether or not that is a folder."""
    home = environment.get(HOME_VARIABLE) or "~/.cache/pipeboost"
    return Path(os.path.abspath(os.path.expanduser(home))) / "compiled"  # as it is where the user has no home


def why_not_own(folder: Path) -> str | None:
    """Return how others could put something into a folder; None where they cannot."""
    if os.name != "posix":
        return None
    own = os.lstat(folder)
    if not stat.S_ISDIR(own.st_mode):
        return "it is no folder"
    if own.st_uid != os.getuid():
        return "it is another user's"
    if own.st_mode & 0o077:
        return f"others may use it (mode {stat.S_IMODE(own.st_mode):o})"
    for parent in folder.resolve().parents:
        found = parent.stat()
        # In a folder with the sticky bit nobody can rename what is another's.
        if found.st_uid not in (0, os.getuid()) or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            return f"others may rename it, for {parent} is open to them"
    return None


def prune(folder: Path, most: int) -> int:
    """Delete the files that were not used for longest, until the others take `most` bytes; return the bytes deleted."""
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may delete it too
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    left = sum(size for _, size, _ in files)
    deleted = 0
    for _, size, path in sorted(files):
        if left - deleted <= most:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            deleted += size
    return deleted
