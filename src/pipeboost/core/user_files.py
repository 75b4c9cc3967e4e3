"""Paths that users name, and the text, YAML or JSON files they write; any fault in one is one sentence."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from pipeboost.core.errors import ConfigurationError, one_line, quoted

LARGEST_TEXT = 64 * 2**20
_FREE_NODES = 10_000


def user_path(given: str | os.PathLike[str], label: str) -> Path:
    """Return the path that a user gave, with `~` expanded; there need be nothing at it yet.

    Args:
        label: names the path in the error.

    Raises:
        ConfigurationError: nothing can be at it, or it cannot be looked at.
    """
    if given == "":
        raise ConfigurationError(f"{label}='' is empty; leave it out or name a path")
    try:
        path = Path(given).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigurationError(f"{label}={quoted(str(given))} cannot be a path: {reason}") from error
    return path


def make_folder(path: Path, label: str) -> None:
    """Make a folder that results will go to, before any work is spent on them.

    Raises:
        ConfigurationError: it cannot be a folder, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{label} cannot be made a folder: {error.strerror}") from error
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigurationError(f"{label} cannot be written to: {error.strerror}") from error


def read_file(given: str | os.PathLike[str], label: str, *, most: int = LARGEST_TEXT, pipes: bool = False) -> bytes:
    """Return the bytes of a regular file, or of a pipe where those are taken.

    Raises:
        ConfigurationError: it is missing, no file, larger than `most` bytes, or cannot be read.
    """
    path = user_path(given, label)
    name = f"{label} {quoted(str(path))[1:-1]}"
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not (pipes and stat.S_ISFIFO(mode)):
            kind = "Is a directory" if stat.S_ISDIR(mode) else "it is a device or a pipe, not a file"
            raise ConfigurationError(f"{name} cannot be read: {kind}")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ConfigurationError(f"{name} cannot be read: {error.strerror or one_line(error)}") from error
    if len(data) > most:
        raise ConfigurationError(f"{name} is larger than {most // 2**20} MiB")
    return data


def read_text(path: Path, label: str) -> str:
    """Return a file's text.

    Raises:
        ConfigurationError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_file(path, label, pipes=True).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{label} {path} is not text in UTF-8") from error


def parse_json(text: str, label: str, **hooks: Any) -> Any:
    """Return what JSON says.

    Raises:
        ConfigurationError: it is not JSON.
    """
    try:
        return json.loads(text, **hooks)
    except ConfigurationError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{label} is not valid JSON: {one_line(error)}") from error


def parse_yaml(text: str, label: str, *, loader: Any = None) -> Any:
    """Return what YAML says, read by PyYAML's safe loader or a subclass of it.

    Raises:
        ConfigurationError: it is not YAML, or its aliases stand for far more than it holds.
    """
    import yaml

    try:
        reading = (loader or yaml.SafeLoader)(text)
        node = reading.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > max(len(text), _FREE_NODES):
            raise ConfigurationError(
                f"{label} has aliases that stand for more than {max(len(text), _FREE_NODES)} values"
            )
        return reading.construct_document(node)
    except ConfigurationError:
        raise
    except Exception as error:  # its constructors let through whatever Python's own raise
        raise ConfigurationError(f"{label} is not valid YAML: {one_line(error)}") from error


def _size(node: Any, known: dict[int, float]) -> float:
    """Return how many values a node stands for once its aliases are written out; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        values = node.value if isinstance(node.value, list) else []
        parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
