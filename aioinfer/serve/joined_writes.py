"""Sends the head of an HTTP response together with its body: one system call, and one packet, instead of two."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["JoiningTransport"]


class JoiningTransport:
    """A transport that joins what is written within one tick of its event loop, two writes at a time.

    Loop thread only. What it does not do itself, the transport does.

    Args:
        transport: of the connection.
        loop: that it belongs to.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""

    def write(self, data: bytes) -> None:
        """Send, at the latest at the end of this tick."""
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def write_at_once(self, data: bytes) -> None:
        """Send now."""
        held, self._held = self._held, b""
        self._transport.write(held + data if held else data)

    def write_eof(self) -> None:
        """Close the way to the peer when all is sent."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close the connection when all is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._transport.write(data)

    def is_closing(self) -> bool:
        """Whether the connection is closed, or is being closed."""
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
