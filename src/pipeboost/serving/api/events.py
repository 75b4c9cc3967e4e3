"""Server-sent events: an image's pictures on the way, and the progress of a job."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import StreamingResponse

from pipeboost.serving.api.common import abandon, api_of, headers_of
from pipeboost.serving.api.errors import ApiError, of_job
from pipeboost.serving.feed import Event
from pipeboost.serving.jobs import Job
from pipeboost.serving.parts import Media

_SILENCE = ": still here\n\n"
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Clients require it; nothing here is paid for by tokens, so none are counted."""


def sent(data: dict[str, Any], event: str = "") -> str:
    """Return one event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data)}\n\n"


def image_stream(request: Request, job: Job, kind: str) -> StreamingResponse:
    """Return the pictures of a job as they come; a client that goes away ends it.

    Args:
        kind: `image_generation` or `image_edit`.
    """
    return _streamed(_images(request, job, kind), job)


def progress_stream(request: Request, job: Job, show: Any) -> StreamingResponse:
    """Return a job as it is after each step, under the event's name; `show` makes JSON of it."""
    return _streamed(_progress(request, job, show), job)


def _streamed(events: AsyncIterator[str], job: Job) -> StreamingResponse:
    # Proxies of nginx's kind would collect what is to be seen at once.
    headers = {"cache-control": "no-store", "x-accel-buffering": "no", **headers_of(job)}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _images(request: Request, job: Job, kind: str) -> AsyncIterator[str]:
    api = api_of(request)
    media, over = api.service.parts.media, False
    try:
        async with contextlib.aclosing(api.service.events(job.id, api.heartbeat)) as events:
            async for event in events:
                if event.kind == "silence":
                    yield _SILENCE
                elif event.kind == "preview":
                    if (picture := await asyncio.to_thread(_preview, event, media)) is not None:
                        index = {"partial_image_index": event.index}
                        yield sent({"type": f"{kind}.partial_image", **_shown(event.job, picture), **index})
                elif event.kind == "ended":
                    over = True
                    yield sent(await _completed(request, event.job, kind))
        if not over:
            over = True
            stopped = ApiError(
                503, f"the server is stopping; {job.id} is run when it is started again", code="unavailable"
            )
            yield sent(stopped.body)
    finally:
        if not over:
            abandon(request, job)


async def _completed(request: Request, job: Job, kind: str) -> dict[str, Any]:
    if job.state == "cancelled":
        return ApiError(409, "the job was cancelled", code="cancelled").body
    if job.error is not None or job.result is None:
        request.state.code = job.error.code if job.error else ""
        return of_job(job.error, job.id).body if job.error else ApiError(500, "the job has no result").body
    from pipeboost.serving.api.common import made

    path = api_of(request).service.paths.of(job.id) / job.result.files[0]
    content = await asyncio.to_thread(path.read_bytes)
    picture = base64.b64encode(content).decode()
    return {"type": f"{kind}.completed", **_shown(job, picture), "usage": USAGE, "pipeboost": made(job)}


def _shown(job: Job, picture: str) -> dict[str, Any]:
    result = job.result
    return {
        "b64_json": picture,
        "background": "opaque",
        "created_at": int(job.created),
        "output_format": job.wire["output_format"],
        "quality": job.wire["quality"],
        "size": f"{result.width}x{result.height}" if result else job.wire["size"],
    }


def _preview(event: Event, media: Media) -> str | None:
    """Return a picture of a step; None where its file is gone, as it is once the job has ended."""
    assert event.picture is not None
    wire, path = event.job.wire, Path(event.picture)
    try:
        pixels = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    pixels = pixels[0] if pixels.ndim == 4 else pixels
    return base64.b64encode(media.encode_image(pixels, wire["output_format"], wire["output_compression"])).decode()


async def _progress(request: Request, job: Job, show: Any) -> AsyncIterator[str]:
    api = api_of(request)
    async with contextlib.aclosing(api.service.events(job.id, api.heartbeat)) as events:
        yield sent(show(await api.service.get(job.id) or job), "job")
        async for event in events:
            if event.kind == "silence":
                yield _SILENCE
            elif event.kind in ("step", "ended"):
                yield sent(show(event.job), "job" if event.kind == "step" else "ended")
