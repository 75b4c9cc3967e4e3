"""The app: what every request passes through, and the endpoints."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeboost.core.errors import quoted
from pipeboost.serving.api import images, jobs, models, videos
from pipeboost.serving.api.common import HEARTBEAT, Api
from pipeboost.serving.api.errors import add_handlers, answer_error, bad, of_exception
from pipeboost.serving.api.metrics import Metrics
from pipeboost.serving.api.security import Guard
from pipeboost.serving.logs import REQUESTS
from pipeboost.serving.service import Service
from pipeboost.serving.settings import Settings


def create_app(service: Service, settings: Settings, *, heartbeat: float = HEARTBEAT) -> FastAPI:
    """Return the app of a service; it starts the service, and stops it when the app stops.

    Raises:
        ConfigurationError: the file of keys cannot be used.
    """
    app = FastAPI(title="pipeboost", docs_url=None, redoc_url=None, lifespan=_lifespan(service, settings))
    api = Api(service, settings, Guard(settings), Metrics(service), heartbeat)
    app.state.api = api
    for module in (images, videos, jobs, models):
        app.include_router(module.router)
    add_handlers(app)
    app.add_exception_handler(RequestValidationError, _answer_query)
    if settings.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origin, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Gate, api=api)
    return app


def _lifespan(service: Service, settings: Settings) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.drain(settings.drain_timeout)

    return lifespan


async def _answer_query(request: Request, error: Exception) -> JSONResponse:
    """Answer for a value in the URL that cannot be used."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    wanted = first["msg"].replace("Input should be", "it must be")
    return await answer_error(request, bad(name, f"{name}={quoted(first.get('input'))}: {wanted}"))


class Gate:
    """Around every request: whose it is, how long its body may be, its id, its line in the log, and its numbers."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        state = scope.setdefault("state", {})
        state.update(request=f"req_{secrets.token_hex(12)}", owner="")

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = state["request"]
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            # A browser asks before it sends a key whether it may; the answer is CORS's own.
            preflight = scope["method"] == "OPTIONS" and bool(self._api.settings.cors_origin)
            state["owner"] = "" if preflight else self._api.guard.owner(scope)
            await self._app(scope, self._api.guard.limited(scope, receive), sending)
        except Exception as error:
            shown = of_exception(error)
            state["code"] = shown.code
            if not status:
                await JSONResponse(shown.body, shown.status, shown.headers)(scope, receive, sending)
        finally:
            self._note(scope, status, time.perf_counter() - start)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        state: dict[str, Any] = scope["state"]
        route = getattr(scope.get("route"), "path", "other")
        self._api.metrics.count_request(route, status, seconds)
        fields = {
            "request": state["request"],
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "key": state["owner"][:8],
        }
        fields |= {name: state[name] for name in ("job", "code", "prompt") if state.get(name)}
        REQUESTS.info("", extra={"fields": fields})
