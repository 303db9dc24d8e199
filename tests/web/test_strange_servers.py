"""Clients of ``connect("ws://...")`` whose server says what it should not: each call ends all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgpack
import pytest
from websockets.asyncio.server import ServerConnection, serve

from aioinfer import InferenceError, ModelError, PeerDiedError, ServerClosedError
from aioinfer.testing import request
from aioinfer.transports.network.connection import FIRST_DELAY
from aioinfer.transports.network.messages import decode_header, encode_message
from aioinfer.transports.network.protocol import PROTOCOL
from tests.limits import HANG
from tests.web.test_network_client import connected

HELLO = {"protocol": PROTOCOL, "policy": "strange", "max_message_size": 2**20, "max_pending": 8}


@asynccontextmanager
async def strange(answer: Callable[[int], Any], **hello: Any) -> AsyncIterator[str]:
    """A server that answers each request with one message, given its number."""

    async def talk(socket: ServerConnection) -> None:
        await socket.send(encode_message({**HELLO, **hello}))
        async for message in socket:
            assert isinstance(message, bytes)
            _, groups, _ = decode_header(message)
            for group in groups:
                for number in group["numbers"]:
                    await socket.send(answer(number))

    async with serve(talk, "127.0.0.1", 0, compression=None) as server:
        host, port = server.sockets[0].getsockname()
        yield f"ws://{host}:{port}"


def told(**header: Any) -> bytes:
    packed: bytes = msgpack.packb({"groups": [], "errors": [], **header})
    return len(packed).to_bytes(4, "little") + packed + bytes(-(len(packed) + 4) % 8)


def replied(**about: Any) -> Callable[[int], bytes]:
    group = {"by_name": False, "batch_size": [], "sizes": [], "leaves": [], "plain": None, **about}
    return lambda number: told(groups=[{"numbers": [number], **group}])


ANSWERS: dict[str, Callable[[int], Any]] = {
    "a text": lambda _: "hello",
    "nothing": lambda _: b"",
    "no header": lambda _: b"\xff" * 64,
    "a header that is no map": lambda _: (1).to_bytes(4, "little") + b"\x01" + bytes(3),
    "no errors": lambda _: told(errors=None),
    "an error without what it is": lambda number: told(errors=[[number]]),
    "an error that is a number": lambda number: told(errors=[[number, 1, 2, 3, 4]]),
    "an error without a number": lambda _: told(errors=[[]]),
    "an error of no number": lambda _: told(errors=[[[], "ValueError", "", ""]]),
    "a reply of too many columns": replied(leaves=[[["x"], "f4", []]] * 2000),
    "a reply that is cut short": replied(leaves=[[["x"], "f4", [1000]]]),
    "a reply that is no group": lambda number: told(groups=[{"numbers": [number]}]),
    "a complaint": lambda _: told(malformed="what?"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_that_can_not_be_read_ends_the_call(answer: Callable[[int], Any]) -> None:
    async with strange(answer) as url, await connected(url) as remote:
        async with asyncio.timeout(HANG):
            with pytest.raises((PeerDiedError, ModelError)):
                await remote.async_client()(request(1))


@pytest.mark.parametrize(
    "hello",
    [{"max_pending": 0}, {"max_pending": -1}, {"max_pending": "many"}, {"max_message_size": -1}, {"policy": None}],
    ids=str,
)
async def test_a_greeting_that_can_not_be_kept_is_no_server(hello: dict[str, Any]) -> None:
    async with strange(lambda _: b"", **hello) as url:
        with pytest.raises(ServerClosedError):
            await connected(url, timeout=HANG)


@pytest.mark.parametrize("banner", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 101 Of course\r\n\r\n"])
async def test_a_server_of_another_protocol_is_told_at_once(banner: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talking.append(asyncio.current_task())
        writer.write(banner)
        with suppress(ConnectionError):
            await reader.read()  # the client hangs up first
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    talking: list[asyncio.Task[None] | None] = []

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(ServerClosedError, match="is no inference server"):
            await connected(f"ws://{host}:{port}", timeout=HANG)
        async with asyncio.timeout(HANG):
            await asyncio.gather(*filter(None, talking))


@pytest.mark.parametrize("url", ["ws://host/#part", "ws://host:port", "ws://host:70000", "ws://[", "ws:///path"])
async def test_a_url_that_is_none_is_a_wrong_argument(url: str) -> None:
    with pytest.raises(ValueError, match="expected ws://host:port or wss://host:port"):
        await connected(url, timeout=0.1)


async def test_a_server_that_greets_and_hangs_up_is_asked_less_and_less_often() -> None:
    greeted = 0
    enough = asyncio.Event()

    async def talk(socket: ServerConnection) -> None:
        nonlocal greeted
        greeted += 1
        await socket.send(encode_message(HELLO))
        if greeted == 6:
            enough.set()

    loop = asyncio.get_running_loop()
    async with serve(talk, "127.0.0.1", 0, compression=None) as server:
        host, port = server.sockets[0].getsockname()
        begin = loop.time()
        async with asyncio.timeout(HANG), await connected(f"ws://{host}:{port}"):
            await enough.wait()
    assert loop.time() - begin > FIRST_DELAY * (1 + 2 + 4 + 8 + 16) / 2  # delays are at least half as long


async def test_an_error_of_a_class_that_is_none_is_told() -> None:
    answer = lambda number: told(errors=[[number, "SystemExit", "no", ""]])  # noqa: E731
    async with strange(answer) as url, await connected(url) as remote:
        with pytest.raises(InferenceError, match="no"):
            await remote.async_client()(request(1))
