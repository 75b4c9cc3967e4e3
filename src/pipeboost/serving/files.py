"""Files of jobs: whole and on the disk, or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from pipeboost.serving.errors import StorageError

PART = ".part"
"""Ending of files that are not whole yet."""


@contextlib.contextmanager
def storage_errors(path: Path, failure: str) -> Iterator[None]:
    """Raise a StorageError for an operating system's: one sentence that begins with the path and the failure."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} {failure}: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk, so that it is whole or as before, whenever the process ends.

    Raises:
        StorageError: it cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{path.name[:40]}-{secrets.token_hex(4)}{PART}")
    with storage_errors(path, "cannot be written"):
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder and all in it; one that is missing is deleted already.

    Raises:
        StorageError: something cannot be deleted.
    """
    with storage_errors(folder, "cannot be deleted"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Delete what is in a folder but the files of these names.

    Raises:
        StorageError: something cannot be deleted.
    """
    with storage_errors(folder, "cannot be tidied up"), contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()


def bytes_of(folder: Path) -> int:
    """Return how much room the files in a folder take on the disk."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            total += path.lstat().st_blocks * 512
    return total
