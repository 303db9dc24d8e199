"""What the app itself counts: requests by protocol and outcome, connections, and how long requests took."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from aioinfer.histogram import SECONDS, Histogram
from aioinfer.stats import Percentiles
from aioinfer.web.access import Refusal

__all__ = ["BYTES", "FrontStats"]

BYTES = tuple(4.0**power for power in range(3, 14))
"""Upper bounds of the buckets of sizes: 64 bytes to 64 MiB."""
_WINDOW_REQUESTS = 2048
_REASONS = {401: "token", 403: "origin", 421: "host", 503: "unavailable"}


class FrontStats:
    """Counted on the app's event loop, in about a microsecond for each request.

    Attributes:
        requests: that have ended, by protocol and outcome: ok, error, invalid, rejected, expired, superseded,
            cancelled.
        inflight: requests that were asked, and have not ended.
        connections: WebSockets that are open, by protocol.
        refused_callers: requests and handshakes by why they were refused: without a valid ``token``, of a foreign
            ``host`` or ``origin``, or ``unavailable``: a drain, or too many connections.
        request_seconds: from the arrival of a request to its reply.
        message_bytes: of requests.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.inflight = 0
        self.connections: Counter[str] = Counter()
        self.refused_callers: Counter[str] = Counter()
        self.request_seconds = Histogram(SECONDS)
        self.message_bytes = Histogram(BYTES)
        self._latest: deque[float] = deque(maxlen=_WINDOW_REQUESTS)

    def count(self, protocol: str, outcome: str, size: int, seconds: float) -> None:
        """Count a request that has ended."""
        self.requests[protocol, outcome] += 1
        self.message_bytes.observe(size)
        if outcome == "ok":
            self.request_seconds.observe(seconds)
            self._latest.append(seconds)

    def refuse(self, refusal: Refusal) -> None:
        """Count a caller that may not ask."""
        self.refused_callers[_REASONS.get(refusal.status, "other")] += 1

    def latest(self) -> Percentiles:
        """From the arrival of a request to its reply, over the latest 2048 that were answered."""
        return Percentiles.of(list(self._latest))

    @contextmanager
    def connected(self, protocol: str) -> Iterator[None]:
        """Count an open connection inside a ``with`` block."""
        self.connections[protocol] += 1
        try:
            yield
        finally:
            self.connections[protocol] -= 1
