"""The types of ASGI, and what a protocol is told when its caller has gone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

__all__ = ["ASGIApp", "Disconnected", "Headers", "Message", "Receive", "Scope", "Send", "headers_of"]

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = dict[bytes, bytes]


class Disconnected(Exception):
    """The caller has closed the connection, or is gone."""


def headers_of(scope: Scope) -> Headers:
    """The headers of a request, by name in lower case."""
    return dict(scope["headers"])
