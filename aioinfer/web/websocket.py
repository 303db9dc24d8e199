"""A WebSocket of the app: messages of bounded size, and an end for callers that do not read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

__all__ = ["Disconnected", "Receive", "Scope", "Send", "WebSocketConnection"]

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

POLICY_VIOLATION, GOING_AWAY, TOO_LARGE = 1008, 1001, 1009


class Disconnected(Exception):
    """The caller has closed the connection, or is gone."""


class WebSocketConnection:
    """Receives and sends messages.

    Loop thread only. One task at a time receives, and one at a time sends.

    Args:
        receive: of ASGI.
        send: of ASGI.
        max_message_size: bytes of a message that is received, at most; larger ones end the connection.
        stall_timeout: seconds that sending may take where the caller does not read; then the connection is closed.
    """

    def __init__(self, receive: Receive, send: Send, *, max_message_size: int, stall_timeout: float) -> None:
        self._receive = receive
        self._send = send
        self._max_message_size = max_message_size
        self._stall_timeout = stall_timeout

    async def accept(self) -> None:
        """Complete the handshake."""
        message = await self._receive()
        if message["type"] != "websocket.connect":
            raise Disconnected
        await self._send({"type": "websocket.accept"})

    async def receive(self) -> bytes | str:
        """Wait for a message.

        Raises:
            Disconnected: there will be none.
        """
        message = await self._receive()
        if message["type"] != "websocket.receive":
            raise Disconnected
        data: bytes | str | None = message.get("bytes")
        if data is None:
            data = message["text"]
        if len(data) > self._max_message_size:
            await self.close(TOO_LARGE, f"messages have at most {self._max_message_size} bytes")
            raise Disconnected
        return data

    async def send(self, data: bytes | str) -> None:
        """Send a message; returns when there is room for the next one.

        Raises:
            Disconnected: the caller is gone, or does not read.
        """
        message: Message = {"type": "websocket.send", "bytes" if isinstance(data, bytes) else "text": data}
        try:
            async with asyncio.timeout(self._stall_timeout):
                await self._send(message)
        except TimeoutError:
            await self.close(POLICY_VIOLATION, "replies are not read")
            raise Disconnected from None
        except OSError:  # uvicorn's ClientDisconnected is one
            raise Disconnected from None

    async def close(self, code: int, reason: str) -> None:
        """Close the connection."""
        try:
            async with asyncio.timeout(self._stall_timeout):
                await self._send({"type": "websocket.close", "code": code, "reason": reason[:120]})
        except (OSError, RuntimeError, TimeoutError):  # it is closed
            pass
