"""Requests that come whole, head and body at once, are answered without the task and the messages that ASGI takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NamedTuple

from aioinfer.batching import Caller
from aioinfer.serve.guard import GuardedHttp
from aioinfer.web.app import App
from aioinfer.web.asgi import Headers
from aioinfer.web.exchange import Exchange

__all__ = ["WholeRequestHttp", "http_of"]

_FOR_ASGI = frozenset({b"content-encoding", b"expect", b"transfer-encoding", b"upgrade"})
_CLOSE = (b"connection", b"close")
_WHOLE_HEAD: Any = {"method": "POST"}  # what a guard looks for in a scope
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class _Head(NamedTuple):
    """The head of a plain request.

    Attributes:
        path: of the request.
        headers: of the request.
        body_size: bytes.
    """

    path: bytes
    headers: Headers
    body_size: int


class KnownHeads:
    """Heads of plain requests that were answered: a caller repeats its own, byte for byte, and it is parsed once.

    Args:
        max_count: heads that are kept; the one that came first makes place for another.
        max_size: bytes of a head that is kept.
    """

    def __init__(self, max_count: int = 1024, max_size: int = 2048) -> None:
        self._max_count = max_count
        self._max_size = max_size
        self._heads: dict[bytes, _Head] = {}

    def find(self, request: bytes) -> tuple[_Head, bytes] | None:
        """The head and the body of a request that is whole, if the head is known."""
        end = request.find(b"\r\n\r\n", 0, self._max_size) + 4
        head = self._heads.get(request[:end])
        return (head, request[end:]) if head is not None and len(request) - end == head.body_size else None

    def add(self, request: bytes, path: bytes, headers: Headers, body_size: int) -> None:
        """Keep the head of a request, if nothing but one request was read.

        Args:
            request: what was read.
            path: of the request that was in it.
            headers: of that request.
            body_size: bytes of its body.
        """
        end = len(request) - body_size
        if request.find(b"\r\n\r\n", 0, self._max_size) + 4 != end:
            return
        if len(self._heads) >= self._max_count:
            del self._heads[next(iter(self._heads))]
        self._heads[request[:end]] = _Head(path, headers, body_size)


class WholeRequestHttp(GuardedHttp):
    """A connection whose requests to infer are handed to the app as soon as they are there.

    What is not plain goes by ASGI: a body that comes in pieces, or encoded; a request that comes before the reply to
    the one before; a caller that reads more slowly than it asks.
    """

    app_that_serves: Callable[[], App | None]
    """The app, if it is there already."""
    known_heads: KnownHeads
    """Of all connections."""
    _between_requests = True  # as far as the parser knows
    _read = b""  # what is being parsed, if it began between two requests
    _body: list[bytes] | None = None  # what was read of the body of a plain request
    _exchange: Exchange | None = None  # that has no response yet
    _answered_at_once = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._cycle = _Cycle()
        self._caller = Caller()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._answered_at_once = False
        if self._between_requests:
            known = self.known_heads.find(data)
            if known is not None and self._is_free() and self.app_that_serves() is not None:
                self._serve_known(*known)
                return
            self._read = data
        super().data_received(data)
        self._read = b""
        if self._body is not None:
            self._continue_by_asgi(self._body)

    def _serve_known(self, head: _Head, body: bytes) -> None:
        """Serve a request past the parser."""
        self.guard.stop_awaiting_request(self)
        if self._awaits_head:
            self._stop_awaiting()
        self.scope = _WHOLE_HEAD
        self._serve(head.path, head.headers, body)

    def on_message_begin(self) -> None:
        self._between_requests = False
        self._answered_at_once = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._is_plain():
            self.scope["method"] = "POST"
            self._begin_cycle()
            self._body = []
            return
        super().on_headers_complete()
        if self._exchange is not None and len(self.pipeline) == 1:
            self.flow.resume_reading()  # else nobody would notice that the caller is gone; the next one is not read

    def _is_plain(self) -> bool:
        app = self.app_that_serves()
        parser = self.parser
        return (
            app is not None
            and app.takes_whole(self.url)
            and self._is_free()
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and _FOR_ASGI.isdisjoint(dict(self.headers))
        )

    def _is_free(self) -> bool:
        """Whether no request is being served, and the caller may have a reply, and has read those before."""
        return (
            not self._refused
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def on_body(self, body: bytes) -> None:
        if self._body is None:
            super().on_body(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._between_requests = True
        if self._body is None:
            super().on_message_complete()
            return
        body, self._body = b"".join(self._body), None
        headers = dict(self.headers)
        if self._serve(self.url, headers, body):
            self.known_heads.add(self._read, self.url, headers, len(body))

    def _begin_cycle(self) -> None:
        self._cycle.response_complete = False
        self.cycle = self._cycle  # type: ignore[assignment]

    def _serve(self, path: bytes, headers: Headers, body: bytes) -> bool:
        """Serve a plain request; return whether its caller may ask."""
        app = self.app_that_serves()
        assert app is not None
        self._begin_cycle()
        exchange = app.answer(path, headers, body, self._caller, self._respond)
        if self._cycle.response_complete:
            self._answered_at_once = True
        else:
            self._exchange = exchange
        return exchange is not None

    def connection_lost(self, exc: Exception | None) -> None:
        app = self.app_that_serves()
        if self._exchange is not None and app is not None:
            app.cancel(self._exchange)
        super().connection_lost(exc)

    def _serves(self) -> bool:
        return self._answered_at_once or super()._serves()

    def _continue_by_asgi(self, body: list[bytes]) -> None:
        """Let the app read a body as it comes."""
        self._body = None
        self.cycle = None  # type: ignore[assignment]
        super().on_headers_complete()
        for part in body:
            super().on_body(part)

    def _respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        self._exchange = None
        self._cycle.response_complete = True
        if self.transport.is_closing():
            return
        if not self._cycle.keep_alive:
            headers = [*headers, _CLOSE]
        self.joining.write_at_once(b"%b%d\r\n\r\n%b" % (_head(status, tuple(headers)), len(body), body))
        if _CLOSE in headers:
            self.transport.close()
        self.on_response_complete()


@lru_cache(maxsize=256)
def _head(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """The head of a response, up to the length of its body."""
    lines = [b"%b: %b\r\n" % header for header in dict.fromkeys(headers)]
    return b"%b%bcontent-length: " % (_STATUS_LINES[status], b"".join(lines))


def http_of(app_that_serves: Callable[[], App | None]) -> type[WholeRequestHttp]:
    """The class of connections to an app, which may be there only later."""
    shared = {"app_that_serves": staticmethod(app_that_serves), "known_heads": KnownHeads()}
    return type("WholeRequestHttp", (WholeRequestHttp,), shared)


class _Cycle:
    """What uvicorn looks at of a request that is being served: it lets those that come meanwhile wait."""

    __slots__ = ("disconnected", "keep_alive", "response_complete")

    message_event = asyncio.Event()
    """Nobody waits for it."""

    def __init__(self) -> None:
        self.response_complete = True
        self.disconnected = False
        self.keep_alive = True
