"""Requests that come whole, head and body at once, are answered without the task and the messages that ASGI takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache
from http import HTTPStatus

from aioinfer.batching import Caller
from aioinfer.serve.guard import GuardedHttp
from aioinfer.web.app import App
from aioinfer.web.exchange import Exchange

__all__ = ["WholeRequestHttp", "http_of"]

_FOR_ASGI = frozenset({b"content-encoding", b"expect", b"transfer-encoding", b"upgrade"})
_CLOSE = (b"connection", b"close")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class WholeRequestHttp(GuardedHttp):
    """A connection whose requests to infer are handed to the app as soon as they are there.

    What is not plain goes by ASGI: a body that comes in pieces, or encoded; a request that comes before the reply to
    the one before; a caller that reads more slowly than it asks.
    """

    app_that_serves: Callable[[], App | None]
    """The app, if it is there already."""
    _body: list[bytes] | None = None  # what was read of the body of a plain request
    _cycle: _Cycle  # of the latest plain request
    _exchange: Exchange | None = None  # that has no response yet
    _caller: Caller | None = None
    _answered_at_once = False

    def data_received(self, data: bytes) -> None:
        self._answered_at_once = False
        super().data_received(data)
        if self._body is not None:
            self._continue_by_asgi(self._body)

    def on_message_begin(self) -> None:
        self._answered_at_once = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._is_plain():
            self.scope["method"] = "POST"
            self.cycle = self._cycle = _Cycle()  # type: ignore[assignment]
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
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and _FOR_ASGI.isdisjoint(dict(self.headers))
        )

    def on_body(self, body: bytes) -> None:
        if self._body is None:
            super().on_body(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._body is None:
            super().on_message_complete()
            return
        body, self._body = b"".join(self._body), None
        app = self.app_that_serves()
        assert app is not None
        if self._caller is None:
            self._caller = Caller()
        exchange = app.answer(self.url, dict(self.headers), body, self._caller, self._respond)
        if self._cycle.response_complete:
            self._answered_at_once = True
        else:
            self._exchange = exchange

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
        cycle = self._cycle
        cycle.response_complete = True
        if self.transport.is_closing():
            return
        if not cycle.keep_alive:
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
    return type("WholeRequestHttp", (WholeRequestHttp,), {"app_that_serves": staticmethod(app_that_serves)})


class _Cycle:
    """What uvicorn looks at of a request that is being served: it lets those that come meanwhile wait."""

    __slots__ = ("disconnected", "keep_alive", "response_complete")

    message_event = asyncio.Event()
    """Nobody waits for it."""

    def __init__(self) -> None:
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = True
