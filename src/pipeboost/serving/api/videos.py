"""`/v1/videos`: jobs that are asked for again and again until they have ended, as OpenAI had it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from pipeboost.serving import finishing
from pipeboost.serving.api import pictures
from pipeboost.serving.api.calls import video_call
from pipeboost.serving.api.common import api_of, body_of, headers_of, made, owned, submit
from pipeboost.serving.api.errors import ApiError, bad
from pipeboost.serving.api.fields import RemixFields, VideoFields, parse
from pipeboost.serving.api.jobs import Limit, Sorted, content, page, whole
from pipeboost.serving.api.openapi import body_schema
from pipeboost.serving.jobs import CANCELLED, Call, Job

router = APIRouter()
_SHOWN = {"queued": "queued", "in_progress": "in_progress", "completed": "completed"}


def shown(job: Job) -> dict[str, Any]:
    """Return a video's job; clients know no other states than four, so that a cancelled one has failed."""
    error = {"code": job.error.code, "message": job.error.message} if job.error else None
    if job.state == "cancelled":
        error = {"code": CANCELLED, "message": "the job was cancelled"}
    return {
        "id": job.id,
        "object": "video",
        "model": job.wire["model"],
        "status": _SHOWN.get(job.state, "failed"),
        "progress": job.progress,
        "created_at": int(job.created),
        "completed_at": whole(job.ended) if job.state == "completed" else None,
        "expires_at": whole(job.expires),
        "error": error,
        "prompt": job.call.prompt,
        "seconds": job.wire["seconds"],
        "size": f"{job.result.width}x{job.result.height}" if job.result else job.wire["size"],
        "remixed_from_video_id": job.wire.get("remixed_from"),
        "pipeboost": made(job),
    }


@router.post("/v1/videos", openapi_extra=body_schema(VideoFields, files=True))
async def create(request: Request) -> Response:
    """Take a video to be made."""
    api, body = api_of(request), await body_of(request)
    fields = parse(VideoFields, body, files=("input_reference", "input_references"))
    contents = body.files.get("input_reference", []) + body.files.get("input_references", [])
    texts = _references(fields)
    if (number := len(contents) + len(texts)) > pictures.MOST:
        raise bad("input_references", f"there are {number} pictures; send at most {pictures.MOST}")
    card = api.card
    call = video_call(fields, card, api.settings, pictures=number)
    contents = contents + await pictures.from_texts(texts, api.settings)
    most = api.settings.max_pixels
    files = await asyncio.to_thread(pictures.prepared, contents, None, "input_reference", most)
    fps = fields.fps or card.fps
    wire = {
        "fps": fields.fps,
        "seconds": str(fields.seconds) if fields.seconds is not None else f"{(call.num_frames or 1) / fps:g}",
        "size": f"{call.width or card.width}x{call.height or card.height}",
    }
    return _answer(await submit(request, "video", call, wire, files, body))


def _references(fields: VideoFields) -> list[tuple[str, str]]:
    """Return the references that are texts, each with the name of its field."""
    given: list[tuple[str, dict[str, str] | str]] = []
    if fields.input_reference is not None:
        given.append(("input_reference", fields.input_reference))
    given += [("input_references", each) for each in fields.input_references or ()]
    if fields.reference_url is not None:
        given.append(("reference_url", fields.reference_url))
    found: list[tuple[str, str]] = []
    for param, each in given:
        if isinstance(each, dict):
            if "file_id" in each:
                raise bad(f"{param}[file_id]", "this server keeps no files of clients; send the picture itself")
            if each.keys() != {"image_url"}:
                raise bad(param, f"{param} must be a picture, or an object with image_url")
            param, each = f"{param}[image_url]", each["image_url"]
        found.append((param, each))
    return found


@router.post("/v1/videos/{video_id}/remix", openapi_extra=body_schema(RemixFields))
async def remix(request: Request, video_id: str) -> Response:
    """Take a video to be made as an earlier one, seed and all, from another prompt."""
    earlier, body = await owned(request, video_id, "video"), await body_of(request)
    fields = parse(RemixFields, body)
    if not fields.prompt.strip() or len(fields.prompt) > api_of(request).settings.max_prompt:
        raise bad("prompt", f"prompt must have 1 to {api_of(request).settings.max_prompt} characters")
    folder = api_of(request).service.paths.of(earlier.id)
    try:
        files = {name: (folder / name).read_bytes() for name in earlier.call.images}
    except FileNotFoundError:
        raise ApiError(404, "the picture of the earlier video is not kept any more", code="not_found") from None
    call = Call(**{**vars(earlier.call), "prompt": fields.prompt})
    wire = {name: earlier.wire[name] for name in ("fps", "seconds", "size")}
    return _answer(await submit(request, "video", call, {**wire, "remixed_from": earlier.id}, files, body))


@router.get("/v1/videos")
async def list_videos(request: Request, after: str = "", limit: Limit = 20, order: Sorted = "desc") -> dict[str, Any]:
    """List the videos of the request's key."""
    service = api_of(request).service
    jobs, more = await service.listed(request.state.owner, kind="video", after=after, limit=limit, order=order)
    return page([shown(job) for job in jobs], more)


@router.get("/v1/videos/{video_id}")
async def retrieve(request: Request, video_id: str) -> Response:
    """Return a video's job."""
    return _answer(await owned(request, video_id, "video"))


@router.delete("/v1/videos/{video_id}")
async def delete(request: Request, video_id: str) -> dict[str, Any]:
    """End a video's job, and delete all of it."""
    await owned(request, video_id, "video")
    await api_of(request).service.delete(video_id)
    return {"id": video_id, "object": "video.deleted", "deleted": True}


@router.get("/v1/videos/{video_id}/content")
async def get_content(
    request: Request, video_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """Return a finished video, or a picture of it."""
    names = {"thumbnail": finishing.THUMBNAIL, "spritesheet": finishing.SPRITESHEET, "video": finishing.VIDEO}
    return content(request, await owned(request, video_id, "video"), names[variant])


def _answer(job: Job) -> Response:
    headers = headers_of(job)
    if job.state in ("queued", "in_progress"):
        headers["openai-poll-after-ms"] = str(int(min(max(50 * job.cost, 200), 5000)))
    return JSONResponse(shown(job), headers=headers)
