"""``GET /metrics`` for Prometheus, and ``GET /stats`` as JSON."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute

from aioinfer.web.front import Front

__all__ = ["metrics_routes"]


def metrics_routes(front: Front, registry: CollectorRegistry | None) -> list[BaseRoute]:
    """Its routes."""
    return []
