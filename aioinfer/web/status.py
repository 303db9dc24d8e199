"""``GET /``: a page with the figures of the server, live."""

from __future__ import annotations

from starlette.routing import BaseRoute

from aioinfer.web.front import Front

__all__ = ["status_routes"]


def status_routes(front: Front) -> list[BaseRoute]:
    """Its routes."""
    return []
