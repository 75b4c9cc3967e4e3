"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, and a status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pipeboost.serving.errors import Busy, IdempotencyError, JobStateError, Unavailable
from pipeboost.serving.jobs import DEADLINE, OUT_OF_MEMORY, REFUSED, WORKER_LOST, Error
from pipeboost.serving.logs import LOG

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error",
    422: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip
_JOB_STATUS = {REFUSED: 400, OUT_OF_MEMORY: 500, WORKER_LOST: 500, DEADLINE: 504}
_RETRY_LATER = 5


class ApiError(Exception):
    """What a request is answered by that cannot be served.

    Args:
        param: the field at fault; nested ones as clients write them.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """Return the answer's JSON."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a field that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def of_job(error: Error, job_id: str) -> ApiError:
    """Return the error for a job that failed; the server has tried already, so that clients need not."""
    headers = {"x-should-retry": "false", "x-pipeboost-job": job_id}
    return ApiError(_JOB_STATUS.get(error.code, 500), error.message, code=error.code, headers=headers)


def of_exception(error: Exception) -> ApiError:
    """Return the error for what the service raises."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        later = {"retry-after": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, f"{error}; try again later", code="queue_full", headers=later)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": str(_RETRY_LATER)})
    if isinstance(error, IdempotencyError):
        return ApiError(422, "this idempotency key came with another request before; use a new one",
                        param="Idempotency-Key", code="idempotency_key_reused")  # fmt: skip
    if isinstance(error, JobStateError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    LOG.error("a request failed inside the server", exc_info=error)
    return ApiError(500, "the server failed to answer this request", code="internal_error")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Return the answer for an exception; whatever is not expected is in the log, and not in the answer."""
    shown = of_exception(error)
    request.state.code = shown.code or ""
    return JSONResponse(shown.body, shown.status, shown.headers)


def add_handlers(app: FastAPI) -> None:
    """Have an app answer all exceptions by the envelope."""
    for kind in (ApiError, Busy, Unavailable, IdempotencyError, JobStateError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
