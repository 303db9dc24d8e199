"""A connection that speaks the protocol of ``connect("ws://...")``, message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from tensordict import TensorDictBase
from websockets.asyncio.client import ClientConnection, connect

from aioinfer.transports.network.errors import error_of
from aioinfer.transports.network.messages import decode_group, decode_header, encode_message, group_payloads
from tests.limits import HANG


def ask_message(
    values: Sequence[float], *, first: int = 0, size: int = 3, cancelled: Sequence[int] = (), **about: Any
) -> bytes:
    """A message of requests whose ``observation`` ``[size]`` holds a value each, and whose numbers begin with one."""
    groups = group_payloads([{"observation": np.full(size, value, np.float32)} for value in values])
    said = {"mode": "inherit", "wait": False, "deadline": None, "callers": [0] * len(values), **about}
    numbered = [({"numbers": [first + index for index in group.indices], **said}, group) for group in groups]
    return encode_message({"cancelled": list(cancelled), "refused": 0}, numbered)


class Stream:
    """One connection to a server.

    Args:
        socket: that has received nothing but the first message.
        hello: which says this.
    """

    def __init__(self, socket: ClientConnection, hello: dict[str, Any]) -> None:
        self.socket = socket
        self.hello = hello
        self.outcomes: dict[int, TensorDictBase | Exception] = {}
        """By number: replies and errors that came."""
        self.malformed: list[str] = []
        """What the server has said of messages that it did not understand."""
        self.messages = 0
        """How many have come."""

    async def receive(self) -> None:
        """Wait for one message."""
        async with asyncio.timeout(HANG):
            message = await self.socket.recv()
        assert isinstance(message, bytes)
        self.messages += 1
        header, groups, position = decode_header(message)
        for about in groups:
            payloads, position = decode_group(about, message, position)
            self.outcomes.update(zip(about["numbers"], payloads, strict=True))  # type: ignore[arg-type]
        self.outcomes.update({number: error_of(packed) for number, *packed in header["errors"]})
        if "malformed" in header:
            self.malformed.append(header["malformed"])

    async def outcome(self, number: int) -> Any:
        """Wait for the reply to one request, or its error."""
        while number not in self.outcomes:
            await self.receive()
        return self.outcomes[number]


@asynccontextmanager
async def streaming(url: str, **options: Any) -> AsyncIterator[Stream]:
    """Connect to the app at a URL, inside an ``async with`` block."""
    url = url.replace("http", "ws", 1) + "/v1/stream"
    async with connect(url, compression=None, max_size=None, open_timeout=HANG, **options) as socket:
        hello = await socket.recv()
        assert isinstance(hello, bytes)
        header, _, _ = decode_header(hello)
        yield Stream(socket, header)
