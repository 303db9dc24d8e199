"""A WebSocket of the app: messages of bounded size, and an end for callers that do not read."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod

from aioinfer.web.asgi import Disconnected, Message, Receive, Send
from aioinfer.web.failures import Failure

__all__ = ["GOING_AWAY", "POLICY_VIOLATION", "TOO_LARGE", "WebSocketConnection", "WebSocketSession"]

POLICY_VIOLATION, GOING_AWAY, TOO_LARGE = 1008, 1001, 1009


class WebSocketSession(ABC):
    """What is asked on one connection, and how it is answered.

    Args:
        connection: not accepted yet.
    """

    protocol: str
    """By which it, and its requests, are counted."""

    def __init__(self, connection: WebSocketConnection) -> None:
        self.connection = connection

    @abstractmethod
    async def run(self) -> None:
        """Accept the connection, and serve until the caller goes.

        Raises:
            Disconnected: it has gone.
        """

    @abstractmethod
    async def drain(self) -> None:
        """Close the connection, with 1001 (going away), as soon as all that was asked is answered."""


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

    async def refuse(self, failure: Failure) -> None:
        """Answer the handshake with an HTTP status instead."""
        await self._receive()
        headers = [(b"content-type", b"application/json")]
        await self._send({"type": "websocket.http.response.start", "status": failure.status, "headers": headers})
        body = json.dumps({"error": failure.message}).encode()
        await self._send({"type": "websocket.http.response.body", "body": body})

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
