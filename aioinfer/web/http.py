"""HTTP requests of the app: bodies of bounded size, replies, and callers that go away, straight over ASGI."""

from __future__ import annotations

import asyncio
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import orjson
from tensordict import TensorDictBase

from aioinfer.errors import InvalidRequestError
from aioinfer.web.access import Refusal
from aioinfer.web.asgi import Disconnected, Headers, Receive, Scope, Send, headers_of
from aioinfer.web.backend import PendingReply
from aioinfer.web.failures import Failure
from aioinfer.web.front import Front
from aioinfer.web.limits import Charge, Limits

__all__ = [
    "JSON",
    "InferEndpoint",
    "Response",
    "failure_response",
    "parse_json",
    "respond",
    "respond_failure",
    "respond_json",
    "to_json",
    "too_large",
]

JSON = (b"content-type", b"application/json")
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_BODY_UNREAD = (408, 413)
_PATIENCE = 0.02  # seconds after which it is worth a task to notice that a caller has gone

Request = TypeVar("Request")


class Response(NamedTuple):
    """A reply of status 200."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (JSON,)


class InferEndpoint(ABC, Generic[Request]):
    """An endpoint that asks the policy: reads a request, asks, and writes the reply.

    Args:
        front: what it shares with the others.
    """

    protocol: str
    """By which its requests are counted."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._senders = _Senders(front.limits)
        self._callers = _Callers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self.serve(headers_of(scope), receive, send)

    async def serve(self, headers: Headers, receive: Receive, send: Send) -> None:
        """Serve one request, whose headers were read already."""
        front = self._front
        pending: PendingReply | None = None
        with front.bytes_in_flight.charge() as charge:
            try:
                body = await self._senders.read(receive, headers, charge)
                received_at = time.perf_counter()
                request = self.decode(headers, body)
                pending = self.submit(request, len(body), received_at)
                response = self.encode(request, await self._callers.reply(pending, receive))
            except Exception as error:
                if pending is None:
                    front.count_refusal(self.protocol, error)
                if not isinstance(error, Disconnected):
                    await respond_failure(send, front.failure_of(error))
            else:
                await respond(send, 200, response.headers, response.body)

    @abstractmethod
    def decode(self, headers: Headers, body: bytes) -> Request:
        """Read a request.

        Raises:
            InvalidRequestError: it is malformed.
        """

    @abstractmethod
    def submit(self, request: Request, size: int, received_at: float) -> PendingReply:
        """Ask: :meth:`Front.submit`."""

    @abstractmethod
    def plain_entries(self, request: Request) -> Any:
        """What is asked; ``None`` where it names a session or a deadline, and :meth:`submit` is to be used."""

    @abstractmethod
    def encode(self, request: Request, reply: TensorDictBase) -> Response:
        """Write the reply."""


class _Callers:
    """Notices that callers have gone, without a task for each request: few take longer than it is worth."""

    def __init__(self) -> None:
        self._waiting: dict[PendingReply, Receive] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def reply(self, pending: PendingReply, receive: Receive) -> TensorDictBase:
        """Wait for the reply; it is not computed if the caller goes before.

        Raises:
            Disconnected: the caller has gone.
        """
        self._waiting[pending] = receive
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(_PATIENCE, self._look)
        try:
            return await pending.reply()
        except asyncio.CancelledError:
            if pending.error is None and pending.future.cancelled() and not _is_being_cancelled():
                raise Disconnected from None
            pending.cancel()
            raise
        finally:
            self._waiting.pop(pending, None)

    def _look(self) -> None:
        self._sweep = None
        latest = time.perf_counter() - _PATIENCE
        for pending, receive in list(self._waiting.items()):
            if pending.received_at > latest:  # those behind it have come later, or as late
                self._sweep = asyncio.get_running_loop().call_later(_PATIENCE, self._look)
                return
            del self._waiting[pending]
            watch = asyncio.create_task(_cancel_when_gone(pending, receive))
            pending.future.add_done_callback(lambda _, watch=watch: watch.cancel())  # type: ignore[misc]


async def _cancel_when_gone(pending: PendingReply, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    pending.cancel()


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Senders:
    """Reads bodies, and gives up those that take too long, without a timer for each request: most come whole.

    Args:
        limits: how large a body may be, also once it is inflated, and how long it may take.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reading: dict[asyncio.Task[Any], float] = {}  # since when, the oldest first
        self._expired: set[asyncio.Task[Any]] = set()
        self._sweep: asyncio.TimerHandle | None = None

    async def read(self, receive: Receive, headers: Headers, charge: Charge) -> bytes:
        """Read the body of a request, and inflate it where it says so.

        Args:
            receive: of ASGI.
            headers: of the request.
            charge: counts its bytes.

        Raises:
            Refusal: it is too large, or takes too long.
            ServerOverloadedError: there are too many bytes in flight.
            InvalidRequestError: it can't be inflated.
            Disconnected: the caller is gone.
        """
        max_size = self._limits.max_message_size
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 18 or int(length) > max_size):
            raise too_large(max_size)
        body = await self._read_in_time(receive, max_size, charge)
        encoding = headers.get(b"content-encoding")
        if encoding is None or encoding.lower() == b"identity":
            return body
        inflated = _inflate(body, encoding.lower(), max_size)
        charge.add(len(inflated))
        return inflated

    async def _read_in_time(self, receive: Receive, max_size: int, charge: Charge) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        self._reading[task] = time.perf_counter()
        if self._sweep is None:
            self._look_later()
        try:
            return await _whole_body(receive, max_size, charge)
        except asyncio.CancelledError:
            if task not in self._expired or task.uncancel():
                raise
            seconds = self._limits.body_timeout
            raise Refusal(408, f"the request took more than {seconds:g} seconds to arrive") from None
        finally:
            del self._reading[task]
            self._expired.discard(task)

    def _look_later(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(self._limits.body_timeout / 8, self._look)

    def _look(self) -> None:
        self._sweep = None
        latest = time.perf_counter() - self._limits.body_timeout
        for task, since in self._reading.items():
            if since > latest:
                break
            if task not in self._expired:
                self._expired.add(task)
                task.cancel()
        if self._reading:
            self._look_later()


async def _whole_body(receive: Receive, max_size: int, charge: Charge) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Disconnected
        part: bytes = message.get("body", b"")
        charge.add(len(part))
        if charge.size > max_size:
            raise too_large(max_size)
        if not message.get("more_body"):
            return part if not parts else b"".join([*parts, part])
        parts.append(part)


def too_large(max_size: int) -> Refusal:
    """Why a body is refused that has more bytes."""
    return Refusal(413, f"a request has at most {max_size} bytes")


def _inflate(body: bytes, encoding: bytes, max_size: int) -> bytes:
    if encoding not in _WINDOW_BITS:
        raise Refusal(415, f"the body is encoded as {encoding.decode('latin-1')[:50]!r}; send it plain, or as gzip")
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        inflated = inflater.decompress(body, max_size + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the body can't be inflated: {error}") from None
    if len(inflated) > max_size:
        raise too_large(max_size)
    if not inflater.eof:
        raise InvalidRequestError("the body is cut short")
    return inflated


def parse_json(body: bytes | memoryview) -> Any:
    """Parse JSON.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return orjson.loads(body)
    except ValueError as error:
        raise InvalidRequestError(f"the request is no JSON: {error}") from None


def to_json(value: Any) -> bytes:
    """Write JSON, with arrays in it as nested lists; ``null`` stands for numbers that are not finite."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


async def respond(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
    """Send a whole reply."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def respond_json(send: Send, status: int, value: Any, headers: Sequence[tuple[bytes, bytes]] = (JSON,)) -> None:
    """Send a reply of JSON."""
    await respond(send, status, headers, to_json(value))


async def respond_failure(send: Send, failure: Failure) -> None:
    """Tell a caller what its request failed of: ``{"error": message}``."""
    await respond(send, *failure_response(failure))


def failure_response(failure: Failure) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of what tells a caller what its request failed of: ``{"error": message}``."""
    headers = [JSON, *failure.headers()]
    if failure.status in _BODY_UNREAD:
        headers.append((b"connection", b"close"))  # what is left of its body would be taken for a request
    return failure.status, headers, to_json({"error": failure.message})
