"""What one caller, and all of them together, may take of the app."""

from __future__ import annotations

from dataclasses import dataclass

from aioinfer.errors import ServerOverloadedError

__all__ = ["BytesInFlight", "Charge", "Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the app.

    Attributes:
        max_message_size: bytes of a WebSocket message, or of a body, inflated.
        max_bytes_in_flight: of all messages whose requests are not answered yet.
        max_pending_per_connection: requests of a connection that have no reply yet. Of a robot, no more is read until
            it has replies; what ``/v1/stream`` is asked beyond them fails, and the caller is told.
        max_connections: WebSockets that are open at once.
        max_sessions: that requests name with a ``session_id``; beyond them the least recently used is forgotten.
        body_timeout: seconds that a body may take to arrive.
        stall_timeout: seconds for which a reply may wait for a caller that does not read.
    """

    max_message_size: int = 64 * 2**20
    max_bytes_in_flight: int = 1024 * 2**20
    max_pending_per_connection: int = 1024
    max_connections: int = 10_000
    max_sessions: int = 10_000
    body_timeout: float = 30.0
    stall_timeout: float = 30.0


class BytesInFlight:
    """Counts the bytes of messages that are being served, and refuses more than there may be.

    Loop thread only.

    Args:
        limit: most bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.bytes = 0

    def add(self, size: int) -> None:
        """Count a message.

        Raises:
            ServerOverloadedError: there would be too many; one message is always taken.
        """
        if self.bytes and self.bytes + size > self._limit:
            raise ServerOverloadedError(f"messages of {self._limit} bytes are being served already; try again later")
        self.bytes += size

    def remove(self, size: int) -> None:
        """Count a message no more."""
        self.bytes -= size

    def charge(self) -> Charge:
        """What one request takes, which is given back at the end of a ``with`` block."""
        return Charge(self)


class Charge:
    """The bytes that one request has been counted with so far.

    Args:
        bytes_in_flight: of all of them.
    """

    __slots__ = ("_all", "size")

    def __init__(self, bytes_in_flight: BytesInFlight) -> None:
        self._all = bytes_in_flight
        self.size = 0

    def add(self, size: int) -> None:
        """Count so many more; see :meth:`BytesInFlight.add`."""
        self._all.add(size)
        self.size += size

    def give_back(self) -> None:
        """Count them no more."""
        self._all.remove(self.size)
        self.size = 0

    def __enter__(self) -> Charge:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()
