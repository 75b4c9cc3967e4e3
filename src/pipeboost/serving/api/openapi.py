"""Schemas of bodies for `/openapi.json`: bodies are read by hand, so that each fault has its own sentence."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_schema(fields: type[BaseModel], *, files: bool = False, json: bool = True) -> dict[str, Any]:
    """Return what an endpoint's description says of its body.

    Args:
        files: fields may be uploads of a form.
    """
    schema = fields.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": schema}} if json else {}
    if files:
        content["multipart/form-data"] = {"schema": {**schema, "additionalProperties": True}}
    return {"requestBody": {"required": True, "content": content}}
