"""Many prompts from one file: a line each, or JSONL, JSON or YAML with a request's own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.user_files import parse_json, parse_yaml, read_text
from pipeboost.generate.requests import FIELDS


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The requests in a file, in order.

    A `.jsonl` file has a JSON object a line; `.json`, `.yaml` and `.yml` files hold a list; any other file is plain
    text with a prompt a line, where blank lines and lines that begin with `#` are skipped. An entry is a prompt, or a
    mapping with the names in `FIELDS`.

    Raises:
        ConfigurationError: the file is missing, holds no prompt, or an entry is not one.
    """
    what, text = f"prompt file {path}", read_text(path, "prompt file")
    suffix, lines = path.suffix.lower(), text.split("\n")  # as read; splitlines would also end one at U+2028
    if suffix == ".jsonl":
        entries = [parse_json(line, f"{what}, line {n},") for n, line in enumerate(lines, 1) if line.strip()]
    elif suffix in (".json", ".yaml", ".yml"):
        entries = parse_json(text, what) if suffix == ".json" else parse_yaml(text, what)
        if entries is not None and not isinstance(entries, list):
            raise ConfigurationError(f"{what} must hold a list of prompts, not a {type(entries).__name__}")
    else:
        entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise ConfigurationError(f"prompt file {path} holds no prompt")
    return [_row(entry, path, number) for number, entry in enumerate(entries, 1)]


def _row(entry: Any, path: Path, number: int) -> dict[str, Any]:
    row = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigurationError(f"prompt file {path}, entry {number}, must be a prompt or a mapping with a prompt")
    for name in row:
        if name not in FIELDS:
            raise ConfigurationError(
                f"prompt file {path}, entry {number}, has no field {quoted(name)}; it may have {', '.join(FIELDS)}"
            )
    return row
