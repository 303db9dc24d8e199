"""Probes of load balancers: whether the process lives, and whether it serves."""

from __future__ import annotations

from starlette.routing import BaseRoute

from aioinfer.web.front import Front

__all__ = ["probe_routes"]


def probe_routes(front: Front) -> list[BaseRoute]:
    """Its routes."""
    return []
