"""Measure what is served over a network: by our app, and by its peers.

The server is in a process of its own (``servers.py`` and ``peers.py``), the callers in the process of the measurement
(``robots.py``, ``http_callers.py`` and ``tasks.py``), which both have one core.
"""

from __future__ import annotations

from aioinfer.bench.report import Figures
from aioinfer.bench.workloads import Job, Protocol, Serving

__all__ = ["load_package", "measure"]


def load_package(job: Job, serving: Serving) -> None:
    """Import what the callers need."""
    if serving.protocol is Protocol.OPENPI:
        from aioinfer.bench.serving import robots  # noqa: F401
    elif serving.protocol is Protocol.STREAM:
        from aioinfer.bench.serving import tasks  # noqa: F401
    else:
        from aioinfer.bench.serving import http_callers  # noqa: F401


def measure(job: Job, serving: Serving) -> Figures:
    """Make one measurement.

    Returns:
        ``rate`` in requests/s; ``p50`` and ``p99`` in seconds over ``count`` requests; beside idle connections also
        ``quiet p99``, without them.
    """
    from aioinfer.bench.serving.servers import running_server

    with running_server(job) as server:
        if serving.protocol is Protocol.OPENPI:
            from aioinfer.bench.serving import robots

            return robots.measure(job, serving, server.port)
        if serving.protocol is Protocol.STREAM:
            from aioinfer.bench.serving import tasks

            return tasks.measure(job, serving, server)
        from aioinfer.bench.serving import http_callers

        return http_callers.measure(job, serving, server.port)
