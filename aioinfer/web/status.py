"""``GET /``: a page with the figures of the server, live; and ``GET /stats``: these figures, as JSON."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from aioinfer.web.front import Front
from aioinfer.web.monitor import Monitor

__all__ = ["status_routes"]

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def status_routes(monitor: Monitor) -> list[BaseRoute]:
    """The routes of the page, and of what it shows.

    Args:
        monitor: knows it.
    """
    page = files("aioinfer.web").joinpath("status.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": _policy_of(page),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def status(_: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    async def stats(_: Request) -> Response:
        return JSONResponse(await _stats_of(monitor), headers={"cache-control": "no-store"})

    return [Route("/", status), Route("/stats", stats)]


def _policy_of(page: str) -> str:
    """What the page may do: run the code that is written in it, and ask this server."""
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            *[f"{kind}-src {' '.join(hashes)}" for kind, hashes in allowed.items()],
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


async def _stats_of(monitor: Monitor) -> dict[str, Any]:
    reading = await monitor.read()
    trouble = monitor.trouble(reading)
    health, stats = reading.health, reading.stats
    return {
        "name": monitor.front.name,
        "version": version("aioinfer"),
        "started_at": monitor.started_at,
        "uptime_seconds": time.time() - monitor.started_at,
        "ready": not trouble,
        "reason": trouble,
        "policy_version": stats.policy_version if stats else health.policy_version if health else None,
        "front": _counts_of(monitor.front),
        "event_loop_lag_seconds": monitor.lag.recent,
        "server": _plain(stats),
        "health": _plain(health),
    }


def _counts_of(front: Front) -> dict[str, Any]:
    stats = front.stats
    requests: dict[str, dict[str, int]] = {}
    for (protocol, outcome), count in stats.requests.items():
        requests.setdefault(protocol, {})[outcome] = count
    return {
        "requests": requests,
        "inflight_requests": stats.inflight,
        "inflight_bytes": front.bytes_in_flight.bytes,
        "connections": dict(stats.connections),
        "sessions": len(front.sessions),
        "refused_callers": dict(stats.refused_callers),
        "request": _plain(stats.latest()),
        "request_seconds": _plain(stats.request_seconds.counted()),
        "message_bytes": _plain(stats.message_bytes.counted()),
    }


def _plain(value: Any) -> Any:
    """What JSON can have."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return value
