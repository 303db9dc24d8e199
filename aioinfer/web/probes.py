"""Probes of load balancers: whether the process lives, and whether it serves."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from aioinfer.web.monitor import Monitor

__all__ = ["probe_routes"]

_HEADERS = {"cache-control": "no-store"}


def probe_routes(monitor: Monitor) -> list[BaseRoute]:
    """Their routes.

    =============  ================================================================  =================================
    path           200                                                               503, with ``{"reason": ...}``
    =============  ================================================================  =================================
    ``/healthz``   always, ``OK``: clients of openpi wait for it                      never
    ``/livez``     the server runs, also while it starts or is drained: leave it be   it has ended, or was not started
    ``/readyz``    requests are served                                                they are not, for this reason
    =============  ================================================================  =================================

    Args:
        monitor: knows how the server is, and waits at most a second for one in another process.
    """

    async def health(_: Request) -> Response:
        return PlainTextResponse("OK\n", headers=_HEADERS)

    async def live(_: Request) -> Response:
        found = (await monitor.read()).health
        dead = found is not None and not found.alive
        return _answer("live", found.reason if found is not None and dead else "")

    async def ready(_: Request) -> Response:
        return _answer("ready", monitor.trouble(await monitor.read()))

    return [Route("/healthz", health), Route("/livez", live), Route("/readyz", ready)]


def _answer(what: str, reason: str) -> Response:
    if not reason:
        return JSONResponse({what: True}, headers=_HEADERS)
    return JSONResponse({what: False, "reason": reason}, 503, headers={**_HEADERS, "retry-after": "1"})
