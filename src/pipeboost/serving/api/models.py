"""`/v1/models`, `/v1/loras`, `/health`, `/ready` and `/metrics`: what there is, and how it is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pipeboost.serving.api.calls import check_model, lora_names
from pipeboost.serving.api.common import Api, api_of
from pipeboost.serving.errors import Unavailable

router = APIRouter()


def _model(api: Api) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": api.settings.model_name, "object": "model", "created": api.started}
    shown["owned_by"] = "pipeboost"
    if (card := api.service.parts.worker.card) is not None:
        shown["pipeboost"] = {
            "pipeline": card.pipeline,
            "kind": card.kind,
            "quality": card.quality,
            "plan": card.plan,
            "size": f"{card.width}x{card.height}",
            "size_multiple": card.size_multiple,
            "num_inference_steps": card.num_inference_steps,
            "takes_image": "image" in card.parameters,
            "takes_mask": card.takes_mask,
            "takes_loras": card.loras,
        }
    return shown


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the model."""
    return {"object": "list", "data": [_model(api_of(request))]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """Return the model."""
    check_model(name, api_of(request).settings)
    return _model(api_of(request))


@router.get("/v1/loras")
async def list_loras(request: Request) -> dict[str, Any]:
    """List the adapters that requests may name."""
    names = lora_names(api_of(request).settings.lora_dir)
    return {"object": "list", "data": [{"id": name, "object": "lora"} for name in names]}


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether this process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether a job that comes now is run: 503 while the model is loaded or warmed, the disk is full, or it stops."""
    service = api_of(request).service
    try:
        fault = await service.store(service.parts.store.check)
    except Unavailable as error:
        fault = str(error)
    if service.ready and not fault:
        return JSONResponse({"status": "ready"})
    reason = "jobs cannot be kept or run" if fault or service.fault else "the server stops"
    if not (fault or service.fault or service.runner.draining):
        reason = "the model is being loaded"
    return JSONResponse({"status": "not ready", "reason": reason}, 503, {"retry-after": "5"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return numbers for Prometheus."""
    api = api_of(request)
    queued = len(await api.service.queued())
    return Response(api.metrics.text(queued), media_type=CONTENT_TYPE_LATEST)
