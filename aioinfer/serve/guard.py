"""Connections of strangers: bounds on the time and the size of request heads, on connections, and on what arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from aioinfer.errors import ServerOverloadedError
from aioinfer.serve.frames import FrameSplitter, frame
from aioinfer.serve.joined_writes import JoiningTransport
from aioinfer.web.limits import BytesInFlight
from aioinfer.web.websocket import DIRECT, POLICY_VIOLATION, OnMessage

__all__ = ["ConnectionGuard", "GuardedHttp", "GuardedWebSocket"]

_TRY_LATER = 1013
_WORTH_A_TURN = 2**12  # bytes of a body
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_BAD_HANDSHAKE = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class _Deadlines:
    """Ends connections that have done nothing for a time, which is the same for all, with one timer.

    Args:
        seconds: that time.
        end: ends a connection.
        clock: seconds; by default those of the event loop.
    """

    def __init__(self, seconds: float, end: Callable[[GuardedHttp], None], clock: Callable[[], float] | None) -> None:
        self._seconds = seconds
        self._end = end
        self._clock = clock
        self._due: dict[GuardedHttp, float] = {}  # the first is due first
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def add(self, connection: GuardedHttp) -> None:
        """End the connection unless :meth:`discard` is called in time."""
        if connection not in self._due:
            if self._clock is None:
                self._clock = connection.loop.time
            self._due[connection] = self._clock() + self._seconds
            if self._timer is None:
                self._timer = connection.loop.call_later(self._seconds, self._on_timer)

    def discard(self, connection: GuardedHttp) -> None:
        """It has done something."""
        self._due.pop(connection, None)

    def end_first(self) -> bool:
        """End the connection that is due first; whether there is one."""
        for connection in self._due:
            del self._due[connection]
            self._end(connection)
            return True
        return False

    def end_late(self) -> float | None:
        """End the connections that are late; return the seconds until the next is due."""
        if self._clock is None:  # there was no connection yet
            return None
        now = self._clock()
        while self._due:
            due_in = next(iter(self._due.values())) - now
            if due_in > 0:
                return due_in
            self.end_first()
        return None

    def stop(self) -> None:
        """End none any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        left = self.end_late()
        if left is not None:
            self._timer = asyncio.get_running_loop().call_later(left, self._on_timer)


class ConnectionGuard:
    """What the connections of one listener share: whose request head is awaited, and what they may take.

    Loop thread only.

    Args:
        head_timeout: seconds that a request head may take: from the beginning of a connection, or from its first byte
            where the connection has been used before.
        keep_alive: seconds for which a connection may be idle between two requests: longer than the 60 of most proxies,
            which would send a request as we close.
        max_head_size: bytes of a request head. The last ones that are read at once may exceed it.
        max_fragments: parts of a WebSocket message: each takes memory of its own, however small it is.
        max_connections: that are open at once. Beyond, a new one takes the place of the one whose request head is
            awaited the longest; it is closed where there is none.
        linger: seconds in which the caller of a WebSocket that was closed may read what was sent; then it is cut off.
        bytes_in_flight: counts what has arrived of a WebSocket message until the app takes it.
        clock: seconds; by default those of the event loop.
    """

    def __init__(
        self,
        *,
        head_timeout: float = 10.0,
        keep_alive: float = 75.0,
        max_head_size: int = 2**16,
        max_fragments: int = 2**14,
        max_connections: int = 10_000,
        linger: float = 10.0,
        bytes_in_flight: BytesInFlight,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.head_timeout = head_timeout
        self.max_head_size = max_head_size
        self.max_fragments = max_fragments
        self.max_connections = max_connections
        self.linger = linger
        self.bytes_in_flight = bytes_in_flight
        self._heads = _Deadlines(head_timeout, GuardedHttp.abort, clock)
        self._idle = _Deadlines(keep_alive, GuardedHttp.close_idle, clock)

    def protocols(self, http: type[GuardedHttp] | None = None) -> tuple[type[GuardedHttp], type[GuardedWebSocket]]:
        """Classes for ``uvicorn.Config(http=..., ws=...)``, of connections that this guard watches.

        Args:
            http: what the first of them extends; by default :class:`GuardedHttp`.
        """
        guarded_http = type("GuardedHttp", (http or GuardedHttp,), {"guard": self})
        guarded_websocket = type("GuardedWebSocket", (GuardedWebSocket,), {"guard": self})
        return guarded_http, guarded_websocket

    @property
    def awaited(self) -> int:
        """How many connections have not sent a whole request head yet, or have begun another one."""
        return len(self._heads)

    def await_head(self, connection: GuardedHttp) -> None:
        """Close the connection unless :meth:`stop_awaiting` is called in time."""
        self._heads.add(connection)

    def stop_awaiting(self, connection: GuardedHttp) -> None:
        """The head is whole, or the connection is closed."""
        self._heads.discard(connection)

    def await_request(self, connection: GuardedHttp) -> None:
        """Close the connection unless :meth:`stop_awaiting_request` is called in time."""
        self._idle.add(connection)

    def stop_awaiting_request(self, connection: GuardedHttp) -> None:
        """A request begins, or the connection is closed."""
        self._idle.discard(connection)

    def make_room(self) -> bool:
        """Close the connection whose request head is awaited the longest; whether there is one."""
        return self._heads.end_first()

    def close_late(self) -> float | None:
        """Close connections whose request head is late; return the seconds until the next is due."""
        return self._heads.end_late()

    def close_idle(self) -> float | None:
        """Close connections that have been idle for too long; return the seconds until the next is due."""
        return self._idle.end_late()

    def close(self) -> None:
        """Stop watching."""
        self._heads.stop()
        self._idle.stop()


class GuardedHttp(HttpToolsProtocol):
    """uvicorn's protocol of HTTP, which lets a connection without a request wait for ever, and heads be of any size.

    While a request is served, uvicorn does what it does.
    """

    guard: ClassVar[ConnectionGuard]
    _head_size = 0
    _awaits_head = False
    _refused = False
    _upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self.guard.max_connections and not self.guard.make_room()
        super().connection_made(transport)
        if full:
            transport.abort()
        else:
            self._bare_transport = transport
            self.joining = JoiningTransport(transport, self.loop)
            self.transport = self.joining  # type: ignore[assignment]
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self.guard.stop_awaiting_request(self)
        super().data_received(data)
        if self._serves() or self._upgraded:
            if self._awaits_head:
                self._stop_awaiting()
            return
        if not self.transport.is_closing():
            self._await_head()
            if not self._head_is_whole():  # else it is the rest of a body, which nobody wants any more
                self._head_size += len(data)
                if self._head_size > self.guard.max_head_size:
                    self._refuse_head()

    def handle_websocket_upgrade(self) -> None:
        self._upgraded = True
        self.transport = self._bare_transport
        super().handle_websocket_upgrade()

    def on_body(self, body: bytes) -> None:
        """Wake the app where it is worth it: a turn of its task for each byte would let slow senders disturb others."""
        cycle = self.cycle
        if self.parser.should_upgrade() or cycle.response_complete or len(cycle.body) + len(body) >= _WORTH_A_TURN:
            super().on_body(body)
        else:
            cycle.body += body  # the app gets it with what follows, or with the end

    def on_response_complete(self) -> None:
        """Serve the request that has come meanwhile, or wait for one: as uvicorn does, without a timer for each."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.guard.await_request(self)

    def abort(self) -> None:
        """Close at once."""
        self.transport.abort()

    def close_idle(self) -> None:
        """Close, and wait no longer for a caller that has not read the last reply."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        self.guard.stop_awaiting_request(self)
        super().connection_lost(exc)

    def _refuse_head(self) -> None:
        """Say why, and wait, as for a head, until the caller closes: to close first, with bytes unread, resets it."""
        self._refused = True
        self.transport.write(_HEAD_TOO_LARGE)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:  # TLS
            self.transport.close()

    def _serves(self) -> bool:
        return self._head_is_whole() and self.cycle is not None and not self.cycle.response_complete

    def _head_is_whole(self) -> bool:
        """Of the latest request: ``on_message_begin`` makes a new scope, and ``on_headers_complete`` fills it in."""
        return self.scope is not None and "method" in self.scope

    def _await_head(self) -> None:
        if not self._awaits_head:
            self._awaits_head = True
            self.guard.await_head(self)

    def _stop_awaiting(self) -> None:
        self._awaits_head = False
        self._head_size = 0
        self.guard.stop_awaiting(self)


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's protocol of WebSockets, which keeps a message until it is whole, and tells nobody how much that is.

    Messages in one binary frame go past its parser, and replies past its state machine, for speed. They go past the
    messages of ASGI too, where the app can do without.
    """

    guard: ClassVar[ConnectionGuard]
    _counted = 0
    _on_message: OnMessage | None = None
    _cut_off: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn.debug = False  # else websockets logs the headers, of which one has the token
        self._splitter = FrameSplitter(self.config.ws_max_size)

    def data_received(self, data: bytes) -> None:
        try:
            self.guard.bytes_in_flight.add(len(data))
        except ServerOverloadedError as error:
            self._fail(_TRY_LATER, str(error))
            return
        self._counted += len(data)
        taken = False
        if self.handshake_initiated:
            taken = self._read_frames(data)
        else:
            super().data_received(data)
            if not self.handshake_initiated:  # it was given the whole head at once, and has not understood it
                self.transport.write(_BAD_HANDSHAKE)
                self.transport.close()
                return
        if self.queue.empty():
            unread = self._unread()
            if taken or not unread:
                self._recount(unread)

    def _read_frames(self, data: bytes) -> bool:
        """Read what has come; return whether the app has taken a message of it already."""
        taken = False
        for piece, is_message in self._splitter.feed(data):
            if not is_message:
                super().data_received(piece)
            elif self._on_message is not None and self._hand_over(piece, self._on_message):
                taken = True
            else:
                self.curr_msg_data_type = "bytes"
                self.frames = [piece]
                self.send_receive_event_to_app()
        return taken

    def _hand_over(self, message: bytes, on_message: OnMessage) -> bool:
        """Give a message to the app now, unless others wait; return whether it has taken it."""
        if not self.queue.empty() or self.close_sent or self.disconnected:
            return False
        counted = self._counted
        self._recount(counted - len(message))  # the app counts what it takes
        if on_message(message):
            return True
        self._recount(counted)
        return False

    def _unread(self) -> int:
        """Bytes that have arrived of what is not whole yet."""
        return self._splitter.held + len(self.conn.reader.buffer) + sum(map(len, self.frames))

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) < self.guard.max_fragments:
            super().handle_cont(event)
        else:
            self.frames = []
            self._fail(POLICY_VIOLATION, f"a message has at most {self.guard.max_fragments} parts")

    def send(self, message: Any) -> Coroutine[Any, Any, None]:
        return (self._refuse if message["type"] == "websocket.http.response.body" else super().send)(message)

    async def _refuse(self, message: Any) -> None:
        await super().send(message)
        if not message.get("more_body"):
            self.handshake_complete = True  # else uvicorn logs that the app has not completed it

    def _send_now(self, data: bytes | str) -> bool:
        is_open = self.handshake_complete and not self.close_sent and not self.disconnected
        if not is_open or not self.writable.is_set():
            return False
        self.transport.write(frame(data))
        return True

    def _set_on_message(self, on_message: OnMessage) -> None:
        self._on_message = on_message

    async def run_asgi(self) -> None:
        self.scope["extensions"][DIRECT] = {"send": self._send_now, "receive": self._set_on_message}
        await super().run_asgi()
        if not self.disconnected:  # asyncio keeps a closed connection until all is read
            self._cut_off = self.loop.call_later(self.guard.linger, self.transport.abort)

    async def receive(self) -> Any:
        message = await super().receive()
        if self.queue.empty():  # the app counts what it has; what is left is of the next message
            self._recount(self._unread())
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        if self._cut_off is not None:
            self._cut_off.cancel()
        self._recount(0)
        super().connection_lost(exc)

    def _recount(self, size: int) -> None:
        if not self.disconnected:
            self.guard.bytes_in_flight.remove(self._counted - size)
            self._counted = size

    def _fail(self, code: int, reason: str) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.conn.fail(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()
