"""A listener in the test's own event loop, and connections to it of which one says each byte."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aioinfer.serve.guard import ConnectionGuard
from aioinfer.serve.listener import Listener, bind
from aioinfer.web.app import App
from aioinfer.web.asgi import ASGIApp, Receive, Scope, Send
from aioinfer.web.limits import BytesInFlight, Limits
from tests.limits import HANG

__all__ = ["GET", "Client", "Clock", "Listening", "connect", "echo", "holds", "listened", "listening"]

GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Clock:
    """Says the time that the test has set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Listening:
    """A listener that is open, and where."""

    listener: Listener
    guard: ConnectionGuard
    port: int


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer requests, and send messages back."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


@asynccontextmanager
async def listening(
    app: ASGIApp = echo,
    *,
    most_bytes: int = 2**30,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    whole: Callable[[], App | None] | None = None,
    **options: Any,
) -> AsyncIterator[Listening]:
    """A listener on a free port; ``options`` are those of its guard, whose clock stands still unless they say more.

    Where there is ``whole``, requests that come whole are answered by that app without ASGI.
    """
    if "head_timeout" not in options:
        options = {"clock": Clock(), **options}
    guard = ConnectionGuard(bytes_in_flight=BytesInFlight(most_bytes), **options)
    sockets = bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    listener = Listener(app, sockets, guard=guard, limits=limits or Limits(), tls=tls, app_that_serves=whole)
    await listener.open()
    try:
        yield Listening(listener, guard, port)
    finally:
        await listener.close(0.0)


@asynccontextmanager
async def listened(app: App, *, lifespan: str = "on") -> AsyncIterator[str]:
    """Serve an app behind a listener; return where it is: ``http://127.0.0.1:port``.

    Args:
        app: is closed at the end.
        lifespan: ``"off"`` leaves its server alone.
    """
    backend = app.front.backend
    started = lifespan == "on" and await backend.start()
    try:
        async with listening(app, limits=app.front.limits, whole=lambda: app) as at:
            yield f"http://127.0.0.1:{at.port}"
            await app.drain(0.0)
    finally:
        if started:
            await backend.stop()
        app.close()


class Client:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, data: bytes) -> None:
        self._writer.write(data)

    async def heard(self) -> bytes:
        """What is said until the connection is closed."""
        async with asyncio.timeout(HANG):
            try:
                return await self._reader.read()
            except ConnectionResetError:
                return b""

    async def head(self) -> bytes:
        """The head of a reply."""
        async with asyncio.timeout(HANG):
            return await self._reader.readuntil(b"\r\n\r\n")

    async def reply(self) -> bytes:
        """The head of a reply, whose body is ``ok``."""
        async with asyncio.timeout(HANG):
            head = await self.head()
            assert await self._reader.readexactly(2) == b"ok"
            return head

    async def ask(self) -> bytes:
        self.say(GET)
        return await self.reply()

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def holds(condition: Callable[[], Any | Awaitable[Any]]) -> None:
    """Wait until a condition of this event loop holds."""
    async with asyncio.timeout(HANG):
        while not condition():  # noqa: ASYNC110 - it is of no one's making
            await asyncio.sleep(0.001)
