"""The body of a request, JSON or multipart, as plain nested values and files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from pipeboost.core.errors import quoted, shortened
from pipeboost.serving.api.errors import ApiError, bad

_FIELDS, _FILES, _DEPTH, _KEY = 200, 40, 8, 200
_NAME = re.compile(r"(?P<root>[^\[\]]+)(?P<rest>(\[[^\[\]]*\])*)")


@dataclass(frozen=True)
class Body:
    """What a client has sent.

    Attributes:
        fields: its values by name; None stands for no value and is left out.
        files: contents of uploads by the name of their field, without brackets.
        typed: whether values have the types of JSON, and are not all texts.
    """

    fields: dict[str, Any]
    files: dict[str, list[bytes]] = field(default_factory=dict)
    typed: bool = True

    def digest(self, path: str) -> str:
        """Return what only an equal request to the same path has too."""
        hashed = hashlib.sha256(path.encode())
        hashed.update(json.dumps(self.fields, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        for name in sorted(self.files):
            for content in self.files[name]:
                hashed.update(name.encode() + hashlib.sha256(content).digest())
        return hashed.hexdigest()


async def read_body(request: Request, most: int) -> Body:
    """Read a request's body.

    Args:
        most: bytes of a text field; the body as a whole is limited before.

    Raises:
        ApiError: it is neither JSON nor a form, or is not well-formed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, most)
    if kind in ("application/json", ""):
        return Body(_flat(_json(await request.body())))
    raise ApiError(415, f"content-type {quoted(kind)} is not read here; send application/json or multipart/form-data")


def _json(content: bytes) -> dict[str, Any]:
    def number(word: str) -> Any:
        raise ValueError(f"{word} is not a number of JSON")

    try:
        values = json.loads(content, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise bad(None, f"the body is not valid JSON: {shortened(str(error), 150)}", "invalid_json") from None
    if not isinstance(values, dict):
        raise bad(None, "the body must be a JSON object with the fields of the request", "invalid_json")
    return values


async def _form(request: Request, most: int) -> Body:
    items: list[tuple[str, str]] = []
    files: dict[str, list[bytes]] = {}
    async with request.form(max_files=_FILES, max_fields=_FIELDS, max_part_size=most) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name.partition("[")[0], []).append(await value.read())
            else:
                items.append((name, value))
    return Body(_flat(nested(items)), files, typed=False)


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Put what is in a literal `extra_body` among the other fields, as the client's library does."""
    extra = fields.pop("extra_body", None)
    if isinstance(extra, str):
        extra = _json(extra.encode("utf-8", "surrogatepass"))
    if extra is not None and not isinstance(extra, dict):
        raise bad("extra_body", f"extra_body={quoted(extra)} must be an object of further fields")
    for name, value in (extra or {}).items():
        if name in fields and fields[name] != value:
            raise bad(name, f"{name}={quoted(fields[name])} contradicts extra_body[{name}]={quoted(value)}; send one")
        fields[name] = value
    return {name: value for name, value in fields.items() if value is not None}


def nested(items: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the values of a form whose names have brackets: `lora[name]`, `images[]`, `loras[][name]`, `a[0][name]`.

    Raises:
        ApiError: a name is not of this kind, or its values contradict each other.
    """
    root: dict[str, Any] = {}
    for name, value in items:
        match = _NAME.fullmatch(name)
        path = [match["root"], *re.findall(r"\[([^\[\]]*)\]", match["rest"])] if match and len(name) <= _KEY else []
        if not path or len(path) > _DEPTH:
            raise bad(shortened(name, 60), f"{quoted(name)} is not a name of a field", "unknown_parameter")
        at = root
        for part in path[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise bad(path[0], f"{path[0]} is sent both as a text and with brackets; send one of them")
        if path[-1] == "":
            at.setdefault("", [])
            if not isinstance(at[""], list):
                raise bad(path[0], f"{path[0]} is sent with different brackets; send one kind")
            at[""].append(value)
        elif "" not in path and path[-1] in at:
            raise bad(path[0], f"{name} is sent twice; send it once")
        else:
            # Columns of a list, `loras[][name]`, come as values of one name.
            known = at.get(path[-1])
            at[path[-1]] = [*(known if isinstance(known, list) else ()), value] if "" in path else value
    return {name: _lists(name, value) for name, value in root.items()}


def _lists(name: str, value: Any) -> Any:
    """Turn mappings that stand for lists into those."""
    if not isinstance(value, dict):
        return value
    if "" in value:
        if len(value) > 1:
            raise bad(name, f"{name} is sent with different brackets; send one kind")
        items = value[""]
        if isinstance(items, list):
            return items
        columns = {key: column for key, column in items.items() if isinstance(column, list)}
        if columns.keys() != items.keys() or len({len(column) for column in columns.values()}) != 1:
            raise bad(name, f"the entries of {name} must all have the same fields, so that they can be told apart")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if all(key.isdecimal() and len(key) < 4 for key in value):
        return [_lists(f"{name}[{key}]", value[key]) for key in sorted(value, key=int)]
    return {key: _lists(f"{name}[{key}]", each) for key, each in value.items()}
