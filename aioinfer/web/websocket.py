"""A WebSocket of the app: messages of bounded size, and an end for callers that do not read."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from aioinfer.web.asgi import Disconnected, Message, Receive, Scope, Send
from aioinfer.web.failures import Failure

__all__ = [
    "DIRECT",
    "GOING_AWAY",
    "POLICY_VIOLATION",
    "TOO_LARGE",
    "OnMessage",
    "WebSocketConnection",
    "WebSocketSession",
]

DIRECT = "aioinfer.direct"
"""An extension of ASGI, for messages without tasks that wait for them.

``"send"`` sends bytes or a text where there is room, and returns whether it did. ``"receive"`` sets an
:data:`OnMessage`, once the connection is accepted.
"""
OnMessage: TypeAlias = Callable[[bytes], bool]
"""Gets a binary message as it comes, if none before it waits to be received; returns whether it takes it."""
POLICY_VIOLATION, GOING_AWAY, TOO_LARGE = 1008, 1001, 1009
_CLOSING = 1.0  # seconds for what was sent before to leave


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
        scope: of ASGI.
        receive: of ASGI.
        send: of ASGI.
        max_message_size: bytes of a message that is received, at most; larger ones end the connection.
        stall_timeout: seconds that sending may take where the caller does not read; then the connection is closed.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, max_message_size: int, stall_timeout: float
    ) -> None:
        self._receive = receive
        self._send = send
        direct = scope.get("extensions", {}).get(DIRECT, {})
        self._send_now = direct.get("send", _can_not_send_now)
        self._set_on_message = direct.get("receive")
        self._take: OnMessage | None = None
        self._max_message_size = max_message_size
        self._stall_timeout = stall_timeout
        self._sender: asyncio.Task[Any] | None = None  # while it sends
        self._sending_since = 0.0
        self._stalled = False
        self._closed = False  # by the app
        self._timer: asyncio.TimerHandle | None = None

    async def accept(self) -> None:
        """Complete the handshake."""
        message = await self._receive()
        if message["type"] != "websocket.connect" or self._closed:
            raise Disconnected
        await self._send({"type": "websocket.accept"})

    async def refuse(self, failure: Failure) -> None:
        """Answer the handshake with an HTTP status instead."""
        await self._receive()
        headers = [(b"content-type", b"application/json"), *failure.headers()]
        await self._send({"type": "websocket.http.response.start", "status": failure.status, "headers": headers})
        body = json.dumps({"error": failure.message}).encode()
        await self._send({"type": "websocket.http.response.body", "body": body})

    def on_message(self, take: OnMessage) -> None:
        """Offer binary messages to a function as they come, where the server of the app can.

        Those that it does not take are received as usual, as are all of them where the server can't.
        """
        self._take = take
        if self._set_on_message is not None:
            self._set_on_message(self._offer)

    def _offer(self, data: bytes) -> bool:
        if self._take is None or self._closed or len(data) > self._max_message_size:
            return False
        return self._take(data)

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
        if self._closed:
            raise Disconnected
        message: Message = {"type": "websocket.send", "bytes" if isinstance(data, bytes) else "text": data}
        task = self._watch_sender()
        try:
            await self._send(message)
        except OSError:  # uvicorn's ClientDisconnected is one
            raise Disconnected from None
        except asyncio.CancelledError:
            if not self._stalled or task.uncancel():
                raise
            await self.close(POLICY_VIOLATION, "replies are not read")
            raise Disconnected from None
        finally:
            self._sender = None

    def send_now(self, data: bytes | str) -> bool:
        """Send a message, if there is room for it and no task sends one; return whether it was sent."""
        return not self._closed and self._sender is None and self._send_now(data)

    def _watch_sender(self) -> asyncio.Task[Any]:
        """Have the running task cancelled if what it does takes too long.

        One timer watches all that is sent within its time: to set one for each message would take 20 us.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._sender, self._sending_since = task, loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._stall_timeout, self._check_sender, loop)
        return task

    def _check_sender(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._sender is None:
            return
        left = self._sending_since + self._stall_timeout - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._check_sender, loop)
        else:
            self._stalled = True
            self._sender.cancel()

    def release(self) -> None:
        """The connection is not used any more."""
        self._take = None
        if self._timer is not None:
            self._timer.cancel()

    async def close(self, code: int, reason: str) -> None:
        """Close the connection, unless it is closed already; a caller that does not read may not hear of it."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(_CLOSING):
                await self._send({"type": "websocket.close", "code": code, "reason": reason[:120]})
        except (OSError, RuntimeError, TimeoutError):  # it is closed
            pass
        except BaseException:
            self._closed = False
            raise


def _can_not_send_now(_: bytes | str) -> bool:
    return False
