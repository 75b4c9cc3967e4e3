"""What the endpoints share: the app's objects, taking a job, waiting for it, and showing it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from pipeboost.serving.api.errors import ApiError, bad
from pipeboost.serving.api.forms import Body, read_body
from pipeboost.serving.api.metrics import Metrics
from pipeboost.serving.api.security import Guard
from pipeboost.serving.errors import Unavailable
from pipeboost.serving.jobs import Call, Job, Kind, ModelCard
from pipeboost.serving.service import Service
from pipeboost.serving.settings import Settings

HEARTBEAT = 15.0
"""Seconds of silence after which a stream says that it lives: proxies close those that are silent for 60."""
_LONGEST_KEY = 255


@dataclass(frozen=True)
class Api:
    """What an app is made of; its endpoints find it in `request.app.state.api`."""

    service: Service
    settings: Settings
    guard: Guard
    metrics: Metrics
    heartbeat: float = HEARTBEAT
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> ModelCard:
        """Return what is known of the model.

        Raises:
            Unavailable: nothing yet.
        """
        if (card := self.service.parts.worker.card) is None:
            raise Unavailable("the model is being loaded")
        return card


def api_of(request: Request) -> Api:
    """Return the objects of the app that a request has come to."""
    api: Api = request.app.state.api
    return api


async def body_of(request: Request) -> Body:
    """Return what a request asks for; text fields may be as long as data URLs of pictures."""
    return await read_body(request, int(api_of(request).settings.max_body * 2**20))


async def submit(
    request: Request, kind: Kind, call: Call, wire: Mapping[str, Any], files: Mapping[str, bytes], body: Body
) -> Job:
    """Take a job for the key of a request.

    Raises:
        ApiError: the key has sent too many.
        PipeboostError: as `Service.submit`.
    """
    api, owner = api_of(request), request.state.owner
    await api.guard.check_rate(owner)
    idempotency = request.headers.get("idempotency-key", "")
    if len(idempotency) > _LONGEST_KEY:
        raise bad("Idempotency-Key", f"Idempotency-Key has more than {_LONGEST_KEY} characters")
    retries = request.headers.get("x-stainless-retry-count", "0")
    job = await api.service.submit(
        owner=owner,
        kind=kind,
        call=call,
        wire={"model": api.settings.model_name, **wire},
        files=files,
        idempotency=idempotency,
        digest=body.digest(request.url.path),
        retried=retries.isdecimal() and int(retries[:3]) > 0,
    )
    request.state.job = job.id
    if api.settings.log_prompts:
        request.state.prompt = call.prompt
    return job


async def finished(request: Request, job: Job) -> Job:
    """Return a job when it has ended; if its client goes away before, and nobody else waits for it, cancel it.

    Raises:
        ApiError: the client has gone.
    """
    service = api_of(request).service
    waiting = asyncio.ensure_future(service.wait(job.id))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)
    abandon(request, job)
    raise ApiError(499, "the client has gone away", code="client_gone")


def abandon(request: Request, job: Job) -> None:
    """Cancel a job that nobody waits for; what has an idempotency key is kept, for its client means to ask again."""
    if "idempotency-key" not in request.headers:
        api_of(request).service.abandon(job.id)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def owned(request: Request, job_id: str, kind: Kind | None = None) -> Job:
    """Return a job of the request's key.

    Raises:
        ApiError: there is none; another key's looks the same.
    """
    job = await api_of(request).service.get(job_id, request.state.owner)
    if job is None or kind not in (None, job.kind):
        raise ApiError(404, f"there is no {kind or 'job'} with this id", param="id", code="not_found")
    return job


def made(job: Job) -> dict[str, Any]:
    """Return what ran, for the field `pipeboost` of an answer."""
    shown: dict[str, Any] = {"id": job.id, "seed": job.call.seed}
    if (result := job.result) is not None:
        shown |= {"seeds": list(result.seeds), "plan": result.plan, "steps": result.steps}
        shown |= {"seconds": round(result.seconds, 4), "stages": dict(result.stages), "notes": list(result.notes)}
    if job.upload:
        shown["url"] = job.upload
    return shown


def headers_of(job: Job) -> dict[str, str]:
    """Return what ran, as headers."""
    shown = {"x-pipeboost-job": job.id, "x-pipeboost-seed": str(job.call.seed)}
    if (result := job.result) is not None:
        shown |= {"x-pipeboost-plan": result.plan, "x-pipeboost-steps": str(result.steps)}
        shown |= {"x-pipeboost-seconds": f"{result.seconds:.3f}"}
    return shown
