"""`/v1/jobs`: images and videos alike, their progress, and their files; images are found again here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response

from pipeboost.serving.api import events
from pipeboost.serving.api.common import api_of, made, owned
from pipeboost.serving.api.errors import ApiError
from pipeboost.serving.jobs import ENDED, Job

router = APIRouter()
Limit = Annotated[int, Query(ge=1, le=100)]
Sorted = Literal["asc", "desc"]
_TYPES = {".png": "image/png", ".jpeg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}


def shown(job: Job) -> dict[str, Any]:
    """Return a job of either kind."""
    failed = {"code": job.error.code, "message": job.error.message} if job.error else None
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "status": job.state,
        "progress": job.progress,
        "step": job.step,
        "steps": job.steps,
        "created_at": int(job.created),
        "started_at": whole(job.started),
        "completed_at": whole(job.ended),
        "expires_at": whole(job.expires),
        "model": job.wire.get("model"),
        "prompt": job.call.prompt,
        "files": [f"/v1/jobs/{job.id}/files/{number}" for number in range(len(job.result.files) if job.result else 0)],
        "error": failed,
        "pipeboost": made(job),
    }


def whole(seconds: float | None) -> int | None:
    """Return a time as clients have it."""
    return None if seconds is None else int(seconds)


@router.get("/v1/jobs")
async def list_jobs(request: Request, after: str = "", limit: Limit = 20, order: Sorted = "desc") -> dict[str, Any]:
    """List the jobs of the request's key."""
    service = api_of(request).service
    jobs, more = await service.listed(request.state.owner, after=after, limit=limit, order=order)
    return page([shown(job) for job in jobs], more)


def page(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """Return a page of a list."""
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": more, **ids}


@router.get("/v1/jobs/{job_id}")
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    """Return a job."""
    return shown(await owned(request, job_id))


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """End a job, and keep it."""
    await owned(request, job_id)
    return shown(await api_of(request).service.cancel(job_id))


@router.delete("/v1/jobs/{job_id}")
async def delete_job(request: Request, job_id: str) -> dict[str, Any]:
    """End a job, and delete all of it."""
    await owned(request, job_id)
    await api_of(request).service.delete(job_id)
    return {"id": job_id, "object": "job.deleted", "deleted": True}


@router.get("/v1/jobs/{job_id}/events")
async def follow_job(request: Request, job_id: str) -> Response:
    """Stream a job after each step, until it has ended."""
    return events.progress_stream(request, await owned(request, job_id), shown)


@router.get("/v1/jobs/{job_id}/files/{number}")
async def get_file(request: Request, job_id: str, number: int) -> Response:
    """Return a finished file, or a range of it."""
    job = await owned(request, job_id)
    names = job.result.files if job.result else ()
    if not 0 <= number < len(names):
        raise ApiError(404, f"the job is {job.state} and has {len(names)} files", param="number", code="not_found")
    return content(request, job, names[number])


def content(request: Request, job: Job, name: str) -> Response:
    """Return a file of a job that is completed; ranges of it are answered too, so that browsers play videos.

    Raises:
        ApiError: there is none.
    """
    if job.state != "completed":
        state = "has failed" if job.state in ENDED else "is not done yet"
        code = job.error.code if job.error else "not_ready"
        raise ApiError(400, f"the job {state}, so that it has no content", code=code)
    path: Path = api_of(request).service.paths.of(job.id) / name
    if not path.is_file():
        raise ApiError(404, "the file is not kept any more", code="not_found")
    headers = {"cache-control": "private, max-age=3600", "content-security-policy": "default-src 'none'"}
    kind = _TYPES.get(path.suffix, "application/octet-stream")
    return FileResponse(path, media_type=kind, filename=f"{job.id}{path.suffix}", headers=headers,
                        content_disposition_type="inline")  # fmt: skip
