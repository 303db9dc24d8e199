"""What callers get before the policy is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from aioinfer.web.access import Access, Refusal
from aioinfer.web.app import App
from aioinfer.web.asgi import Message, Receive, Scope, Send, headers_of
from aioinfer.web.failures import failure_of
from aioinfer.web.http import respond_json
from aioinfer.web.limits import Limits
from aioinfer.web.websocket import GOING_AWAY, WebSocketConnection

__all__ = ["StartingApp"]

_LIVE = {"/livez", "/v2/health/live"}
_TRY_LATER = 1013


class StartingApp:
    """An ASGI app that serves another one from when that is there.

    Until then it says that it lives and is not ready, and refuses requests with 503. WebSockets are accepted at once,
    their pings are answered, and they are served as soon as there is something to serve: a robot waits for its first
    message for as long as it takes, but not for a handshake.

    Loop thread only.

    Args:
        access: who may ask.
        limits: of messages.

    Attributes:
        app: that it serves, if that is there.
        reason: why it is not ready.
    """

    def __init__(self, access: Access, limits: Limits) -> None:
        self.app: App | None = None
        self.reason = "the policy is being loaded"
        self._access = access
        self._limits = limits
        self._decided = asyncio.Event()

    def serve(self, app: App) -> None:
        """Serve this app from now on."""
        self.app = app
        self._decided.set()

    def end(self, reason: str) -> None:
        """Close the WebSockets that wait: there will be no app."""
        self.reason = reason
        self._decided.set()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        """Serve one request, or connection."""
        if self.app is not None:
            return self.app(scope, receive, send)
        return (self._hold if scope["type"] == "websocket" else self._respond)(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            self._access.check_page(headers_of(scope))
        except Refusal as refusal:
            await respond_json(send, refusal.status, {"error": str(refusal)})
            return
        if path in _LIVE:
            await respond_json(send, 200, {"live": True})
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await respond_json(send, 503, {"error": self.reason, "ready": False, "reason": self.reason}, headers)

    async def _hold(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = WebSocketConnection(
            scope,
            receive,
            send,
            max_message_size=self._limits.max_message_size,
            stall_timeout=self._limits.stall_timeout,
        )
        try:
            self._access.check_page(headers_of(scope))
            self._access.check_token(headers_of(scope))
        except Refusal as refusal:
            await connection.refuse(failure_of(refusal))
            return
        await connection.accept()
        await self._decided.wait()
        if self.app is None:
            await connection.close(GOING_AWAY, self.reason)
        else:
            accepted = _Accepted(receive, send)
            await self.app(scope, accepted.receive, accepted.send)


class _Accepted:
    """A WebSocket that is open already, for an app that is about to accept it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._connected = False

    async def receive(self) -> Message:
        if self._connected:
            return await self._receive()
        self._connected = True
        return {"type": "websocket.connect"}

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.http.response.start":
            await self._send({"type": "websocket.close", "code": _TRY_LATER, "reason": "refused"})
        elif kind not in ("websocket.accept", "websocket.http.response.body"):
            await self._send(message)
