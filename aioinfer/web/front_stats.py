"""What the app itself counts: requests by protocol and outcome, connections, and how long requests took."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SECONDS", "FrontStats", "Histogram"]

SECONDS = (50e-6, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the buckets of durations. A policy may take less than the first bound that others have."""
BYTES = tuple(4.0**power for power in range(3, 14))
"""Upper bounds of the buckets of sizes: 64 bytes to 64 MiB."""


class Histogram:
    """Counts values in buckets.

    Args:
        bounds: their upper bounds, ascending; a last bucket has the rest.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class FrontStats:
    """Counted on the app's event loop, in some 0.5 us for each request.

    Attributes:
        requests: by protocol and outcome: ok, error, invalid, rejected, expired, superseded, cancelled.
        connections: WebSockets that are open, by protocol.
        refused_callers: requests and handshakes without a token, or of a foreign host or origin.
        request_seconds: from the arrival of a request to its reply.
        message_bytes: of requests.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.connections: Counter[str] = Counter()
        self.refused_callers = 0
        self.request_seconds = Histogram(SECONDS)
        self.message_bytes = Histogram(BYTES)

    def count(self, protocol: str, outcome: str, size: int, seconds: float) -> None:
        """Count a request that has ended."""
        self.requests[protocol, outcome] += 1
        self.message_bytes.observe(size)
        if outcome == "ok":
            self.request_seconds.observe(seconds)

    @contextmanager
    def connected(self, protocol: str) -> Iterator[None]:
        """Count an open connection inside a ``with`` block."""
        self.connections[protocol] += 1
        try:
            yield
        finally:
            self.connections[protocol] -= 1
