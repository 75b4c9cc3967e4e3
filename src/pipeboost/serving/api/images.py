"""`/v1/images/generations` and `/v1/images/edits`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from pipeboost.serving.api import events, pictures
from pipeboost.serving.api.calls import image_call
from pipeboost.serving.api.common import api_of, body_of, finished, headers_of, made, submit
from pipeboost.serving.api.errors import ApiError, bad, of_job
from pipeboost.serving.api.fields import EditFields, ImageFields, parse
from pipeboost.serving.api.forms import Body
from pipeboost.serving.api.openapi import body_schema
from pipeboost.serving.jobs import Call, Job

router = APIRouter()


@router.post("/v1/images/generations", openapi_extra=body_schema(ImageFields))
async def generate(request: Request) -> Response:
    """Make images from a prompt."""
    api, body = api_of(request), await body_of(request)
    fields = parse(ImageFields, body)
    call = image_call(fields, api.card, api.settings)
    return await _answer(request, fields, call, {}, body, "image_generation")


@router.post("/v1/images/edits", openapi_extra=body_schema(EditFields, files=True))
async def edit(request: Request) -> Response:
    """Make images from a prompt and pictures."""
    api, body = api_of(request), await body_of(request)
    fields = parse(EditFields, body, files=("image", "mask"))
    given = [fields.image] if isinstance(fields.image, str) else fields.image or []
    files, masks = body.files.get("image", []), body.files.get("mask", [])
    number = len(files) + len(given)
    if not number:
        raise bad("image", "image is missing; send the picture to edit", "missing_required_parameter")
    if number > pictures.MOST:
        raise bad("image", f"image has {number} pictures; send at most {pictures.MOST}")
    if len(masks) + (fields.mask is not None) > 1:
        raise bad("mask", "mask is there more than once; send one")
    call = image_call(fields, api.card, api.settings, pictures=number, mask=bool(masks) or fields.mask is not None)
    contents = files + await pictures.from_texts([("image", text) for text in given], api.settings)
    if fields.mask is not None:
        masks = await pictures.from_texts([("mask", fields.mask)], api.settings)
    mask = masks[0] if masks else None
    kept = await asyncio.to_thread(pictures.prepared, contents, mask, "image", api.settings.max_pixels)
    return await _answer(request, fields, call, kept, body, "image_edit")


async def _answer(
    request: Request, fields: ImageFields, call: Call, files: dict[str, bytes], body: Body, kind: str
) -> Response:
    card = api_of(request).card
    wire = {
        "output_format": fields.output_format,
        "output_compression": fields.output_compression,
        "response_format": fields.response_format,
        "quality": fields.quality if fields.quality in ("low", "medium", "high", "xhigh", "max") else "auto",
        "size": f"{call.width or card.width}x{call.height or card.height}",
    }
    job = await submit(request, "image", call, wire, files, body)
    if fields.stream:
        return events.image_stream(request, job, kind)
    job = await finished(request, job)
    if job.state == "cancelled":
        raise ApiError(409, "the job was cancelled", code="cancelled", headers={"x-should-retry": "false"})
    if job.error is not None:
        raise of_job(job.error, job.id)
    return JSONResponse(await _images(request, job), headers=headers_of(job))


async def _images(request: Request, job: Job) -> dict[str, Any]:
    result = job.result
    assert result is not None
    if job.wire["response_format"] == "url":
        base = str(request.base_url).rstrip("/")
        data = [{"url": f"{base}/v1/jobs/{job.id}/files/{number}"} for number in range(len(result.files))]
    else:
        folder = api_of(request).service.paths.of(job.id)
        paths = [folder / name for name in result.files]
        data = [{"b64_json": text} for text in await asyncio.to_thread(_encoded, paths)]
    shown = {
        "created": int(job.created),
        "data": data,
        "background": "opaque",
        "output_format": job.wire["output_format"],
        "size": f"{result.width}x{result.height}",
        "usage": events.USAGE,
        "pipeboost": made(job),
    }
    # Clients know no `auto` in answers.
    return shown if job.wire["quality"] == "auto" else {**shown, "quality": job.wire["quality"]}


def _encoded(paths: Sequence[Any]) -> list[str]:
    return [base64.b64encode(path.read_bytes()).decode() for path in paths]
