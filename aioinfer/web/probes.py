"""Probes of load balancers: whether the process lives, and whether it serves."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from aioinfer.web.monitor import Monitor

__all__ = ["probe_routes"]

_RETRY_AFTER = {"retry-after": "1"}


def probe_routes(monitor: Monitor) -> list[BaseRoute]:
    """``/livez``: the event loop runs. ``/readyz``: requests are served. ``/healthz``: the same, as openpi says it.

    Args:
        monitor: knows whether the server is ready.
    """

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_: Request) -> Response:
        reason = monitor.trouble(await monitor.read())
        if not reason:
            return JSONResponse({"ready": True})
        return JSONResponse({"error": reason, "ready": False, "reason": reason}, 503, _RETRY_AFTER)

    async def healthy(_: Request) -> Response:
        reason = monitor.trouble(await monitor.read())
        return PlainTextResponse("OK\n") if not reason else PlainTextResponse(f"{reason}\n", 503, _RETRY_AFTER)

    return [Route("/livez", live), Route("/readyz", ready), Route("/healthz", healthy)]
