"""The HTTP server: binds, says where, and when it is told to stop lets jobs end before connections."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from pipeboost.core.errors import ConfigurationError
from pipeboost.serving.api.app import create_app
from pipeboost.serving.logs import LOG
from pipeboost.serving.service import Service
from pipeboost.serving.settings import Settings

_ANSWERS = 5
"""Seconds for the last answers, once all jobs have ended or wait again."""


def bound(settings: Settings) -> socket.socket:
    """Return a socket at the host and port of the settings.

    Raises:
        ConfigurationError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(f"--host {settings.host} --port {settings.port} cannot be had: {reason}") from error


class Server(uvicorn.Server):
    """Serves one service; SIGTERM and SIGINT drain it, a second SIGINT ends it at once."""

    def __init__(self, service: Service, settings: Settings, *, heartbeat: float | None = None) -> None:
        self._service, self._settings = service, settings
        app = create_app(service, settings, **({} if heartbeat is None else {"heartbeat": heartbeat}))
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_ANSWERS
            )
        )
        service.on_failure = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for each in sockets or ():
            host, port = each.getsockname()[:2]
            where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            LOG.info("serving %s at %s", self._settings.model_name, where)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the service while `/ready` and those who wait are still answered, then close."""
        draining = asyncio.ensure_future(self._service.drain(self._settings.drain_timeout))
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=0.1)
        if draining.done():
            draining.result()
        await super().shutdown(sockets)


async def serve(service: Service, settings: Settings, listening: socket.socket) -> None:
    """Serve until the process is told to stop.

    Raises:
        Exception: what ended the service.
    """
    await Server(service, settings).serve(sockets=[listening])
    if service.failure is not None:
        raise service.failure
