"""Who may ask: keys, rates, the size of what they send, and pages of the web that reach for a server on loopback."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from limits import parse as parse_rate
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from pipeboost.serving.api.errors import ApiError
from pipeboost.serving.settings import Settings

OPEN = ("/health", "/ready", "/openapi.json")
"""What is answered without a key, and to whatever host: it says nothing about jobs."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Says whose a request is, or refuses it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys = {_digest(key): _owner(key) for key in settings.all_keys()}
        self._rate = parse_rate(settings.rate_limit.replace("/", " per ")) if settings.rate_limit else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def owner(self, scope: Scope) -> str:
        """Return the digest of the key that a request has; empty where none is asked for.

        Raises:
            ApiError: it has none or another one, or is none that a server on loopback answers.
        """
        headers = Headers(scope=scope)
        if scope["path"] in OPEN:
            return ""
        if not self._keys:
            self._check_origin(headers)
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest, owner = _digest(given.strip()), None
        for known, theirs in self._keys.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(known, digest):
                owner = theirs
        if scheme.lower() != "bearer" or owner is None:
            what = "a wrong API key" if given else "no API key"
            raise ApiError(401, f"the request has {what}; send it as `Authorization: Bearer KEY`",
                           code="invalid_api_key", headers={"www-authenticate": "Bearer"})  # fmt: skip
        return owner

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Refuse what a page of the web may have sent: browsers let pages post forms to this machine."""
        host = re.sub(r":\d+$", "", headers.get("host", "").lower())
        if host not in (*_LOOPBACK, self._settings.host.lower(), f"[{self._settings.host.lower()}]"):
            raise ApiError(403, "the request names another host than this machine; with --api-key any is served",
                           param="Host", code="host_not_allowed")  # fmt: skip
        origin = headers.get("origin")
        if origin is None or origin in self._settings.cors_origin:
            return
        try:
            from_here = urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        except ValueError:
            from_here = False
        if not from_here:
            raise ApiError(403, "the request comes from a page of another site; allow that one by --cors-origin",
                           param="Origin", code="origin_not_allowed")  # fmt: skip

    async def check_rate(self, owner: str) -> None:
        """Count a request that makes something.

        Raises:
            ApiError: the key has sent too many.
        """
        if self._rate is None or await self._limiter.hit(self._rate, owner):
            return
        import time

        left = (await self._limiter.get_window_stats(self._rate, owner)).reset_time - time.time()
        raise ApiError(429, f"more than {self._settings.rate_limit} requests of this key; try again later",
                       code="rate_limit_exceeded", headers={"retry-after": str(max(1, math.ceil(left)))})  # fmt: skip

    def limited(self, scope: Scope, receive: Receive) -> Receive:
        """Return what receives a request's body, no longer than it may be.

        Raises:
            ApiError: its length is known and too large; the returned function raises the same where it is not known.
        """
        most = int(self._settings.max_body * 2**20)
        error = ApiError(413, f"the body is larger than {self._settings.max_body:g} MiB", code="body_too_large")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise error
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise error
            return message

        return counted


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _owner(key: str) -> str:
    return hashlib.sha256(b"owner of jobs: " + key.encode()).hexdigest()[:32]
