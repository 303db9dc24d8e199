"""HTTP requests of the app: bodies of bounded size, and replies, straight over ASGI."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Mapping
from typing import Any

from aioinfer.errors import InvalidRequestError
from aioinfer.web.access import Refusal
from aioinfer.web.websocket import Receive, Scope, Send

__all__ = ["Headers", "headers_of", "parse_json", "read_body", "respond", "respond_json"]

Headers = dict[bytes, bytes]

_JSON = [(b"content-type", b"application/json")]
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}


def headers_of(scope: Scope) -> Headers:
    """The headers of a request, by name in lower case."""
    return dict(scope["headers"])


async def read_body(receive: Receive, headers: Headers, *, max_size: int, timeout: float) -> bytes:  # noqa: ASYNC109
    """Read the body of a request, and inflate it where it says so.

    Args:
        receive: of ASGI.
        headers: of the request.
        max_size: bytes, also once it is inflated.
        timeout: seconds that the sender has.

    Raises:
        Refusal: it is too large, or takes too long.
        InvalidRequestError: it can't be inflated.
        ConnectionError: the caller is gone.
    """
    length = headers.get(b"content-length")
    if length is not None and (not length.isdigit() or int(length) > max_size):
        raise _too_large(max_size)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):  # most come whole
        body: bytes = message.get("body", b"")
    else:
        try:
            async with asyncio.timeout(timeout):
                body = await _rest(message, receive, max_size)
        except TimeoutError:
            raise Refusal(408, f"the request took more than {timeout:g} seconds to arrive") from None
    if len(body) > max_size:
        raise _too_large(max_size)
    encoding = headers.get(b"content-encoding", b"identity").lower()
    return body if encoding == b"identity" else _inflate(body, encoding, max_size)


async def _rest(message: Mapping[str, Any], receive: Receive, max_size: int) -> bytes:
    parts, size = [], 0
    while True:
        if message["type"] != "http.request":
            raise ConnectionError("the caller is gone")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_size:
            raise _too_large(max_size)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _too_large(max_size: int) -> Refusal:
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
        raise _too_large(max_size)
    if not inflater.eof:
        raise InvalidRequestError("the body is cut short")
    return inflated


def parse_json(body: bytes | memoryview) -> Any:
    """Parse JSON.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the request is no JSON: {error}") from None


async def respond(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Send a whole reply."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def respond_json(send: Send, status: int, value: Any, headers: list[tuple[bytes, bytes]] = _JSON) -> None:
    """Send a reply of JSON."""
    await respond(send, status, headers, json.dumps(value).encode())
