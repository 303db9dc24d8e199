"""Connections that ask for nothing, or never end asking: closed, and no trouble to others."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import websockets.asyncio.client as websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from aioinfer.serve.guard import GuardedWebSocket
from aioinfer.web.asgi import Receive, Scope, Send
from aioinfer.web.websocket import DIRECT
from tests.limits import HANG
from tests.web.listening import GET, Clock, Listening, connect, echo, holds, listening

LATE = 11.0  # seconds: later than a head may be


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\nhost: local", b"\r\n", GET[:-2]], ids=["nothing", "half", "blank", "all but one"]
)
async def test_a_connection_whose_first_head_is_late_is_closed(said: bytes) -> None:
    clock = Clock()
    async with listening(clock=clock) as at, connect(at.port) as late, connect(at.port) as good:
        late.say(said)
        await good.ask()
        await holds(lambda: at.guard.awaited == 1)
        assert at.guard.close_late() == 10.0
        clock.now = LATE
        assert at.guard.close_late() is None
        assert await late.heard() == b""
        assert await good.ask()


@pytest.mark.parametrize("said", [b"G", GET[:-2], b"\r\n"], ids=["a byte", "all but one", "blank"])
async def test_a_connection_whose_next_head_is_late_is_closed(said: bytes) -> None:
    clock = Clock()
    async with listening(clock=clock) as at, connect(at.port) as late:
        await late.ask()
        await late.ask()
        clock.now = 100.0
        assert at.guard.close_late() is None
        late.say(said)
        await holds(lambda: at.guard.awaited == 1)
        late.say(said[:0])
        clock.now += LATE
        at.guard.close_late()
        assert await late.heard() == b""


async def test_bytes_that_trickle_in_win_no_time() -> None:
    clock = Clock()
    async with listening(clock=clock) as at, connect(at.port) as late:
        for second in range(9):
            clock.now = second
            late.say(b"x-a: b\r\n" if second else GET[:-2])
            await holds(lambda: at.guard.awaited == 1)
        clock.now = LATE
        at.guard.close_late()
        assert await late.heard() == b""


async def test_the_rest_of_a_body_that_nobody_wants_is_late_too() -> None:
    clock = Clock()
    async with listening(clock=clock) as at, connect(at.port) as late:
        late.say(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 300000\r\n\r\n")
        await late.reply()
        late.say(bytes(200_000))  # more than a head may have
        await holds(lambda: at.guard.awaited == 1)
        late.say(bytes(100_000))
        assert await late.ask()
        assert at.guard.awaited == 0


async def test_a_request_that_is_served_and_a_websocket_have_time() -> None:
    clock, gate = Clock(), asyncio.Event()

    async def gated(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await echo(scope, receive, send)

    async with listening(gated, clock=clock) as at, connect(at.port) as client:
        client.say(GET)
        await holds(lambda: at.guard.awaited == 0)
        opening = asyncio.create_task(dial(at).__aenter__())
        clock.now = LATE
        gate.set()
        async with await opening as open_websocket:
            at.guard.close_late()
            assert at.guard.awaited == 0
            await open_websocket.send("hello")
            assert await open_websocket.recv() == "hello"
        assert await client.reply()


async def test_late_connections_are_closed_without_being_asked_to() -> None:
    async with listening(head_timeout=0.02) as at:
        for _ in range(2):  # the timer is set again
            async with connect(at.port) as first, connect(at.port) as second:
                assert [await first.heard(), await second.heard()] == [b"", b""]


@pytest.mark.parametrize("parts", [1, 100])
async def test_a_head_that_is_too_large_is_refused(parts: int) -> None:
    async with listening(max_head_size=10_000) as at, connect(at.port) as client:
        client.say(GET[:-2] + b"x: ")
        for _ in range(parts):
            client.say(b"y" * (20_000 // parts))
        assert (await client.heard()).startswith(b"HTTP/1.1 431 ")


async def test_a_new_connection_takes_the_place_of_the_one_that_says_nothing_the_longest() -> None:
    async with listening(max_connections=3) as at, AsyncExitStack() as stack:
        good = await stack.enter_async_context(connect(at.port))
        await good.ask()
        silent = []
        for count in (1, 2):
            silent.append(await stack.enter_async_context(connect(at.port)))
            await holds(partial(awaits, at, count))
        newcomer = await stack.enter_async_context(connect(at.port))
        assert await newcomer.ask()
        assert await silent[0].heard() == b""
        assert await good.ask()
        silent[1].say(GET)
        assert await silent[1].reply()
        async with connect(at.port) as refused:  # all others have asked before
            assert await refused.heard() == b""
        assert await good.ask()


def dial(at: Listening, **options: Any) -> websocket.connect:
    return websocket.connect(f"ws://127.0.0.1:{at.port}", open_timeout=HANG, **options)


def awaits(at: Listening, count: int) -> bool:
    return at.guard.awaited == count


@contextmanager
def half_open(port: int, count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), HANG))
            one.send(b"GET / HTTP/1.1\r\n")
        yield


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """This process may have both ends of a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"a process may have {hard} descriptors")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
async def test_a_thousand_half_open_connections_do_not_disturb_a_good_client() -> None:
    async with listening() as at, connect(at.port) as good:
        await good.ask()
        with half_open(at.port, 1000):
            for _ in range(100):
                assert await good.ask()
            async with connect(at.port) as newcomer:
                assert await newcomer.ask()
            await holds(lambda: at.guard.awaited == 1000)
        await holds(lambda: at.guard.awaited == 0)


@pytest.mark.parametrize("size", [2, 1000, 10_000])
async def test_the_app_is_not_woken_for_each_byte_of_a_slow_sender(size: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        more = True
        while more:
            message = await receive()
            read.append(message["body"])
            more = message["more_body"]
        await echo(scope, receive, send)

    begun = asyncio.Event()
    read: list[bytes] = []
    async with listening(app) as at, connect(at.port) as client:
        client.say(GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\ncontent-length: %d\r\n\r\n" % size))
        await begun.wait()
        for _ in range(size):
            client.say(b"x")
            await asyncio.sleep(0)
        assert (await client.reply()).startswith(b"HTTP/1.1 200")
    assert b"".join(read) == b"x" * size
    assert len(read) <= 1 + size // 2**12


async def parts(*sizes: int, gate: asyncio.Event) -> AsyncIterator[bytes]:
    """A message in parts, of which the last one waits for the gate."""
    for size in sizes:
        yield bytes(size)
    await gate.wait()
    yield b"end"


async def code_after(connection: websocket.ClientConnection, message: bytes | AsyncIterator[bytes]) -> int | None:
    """Send a message, and return the code with which the connection is closed."""
    with suppress(ConnectionClosed):
        await connection.send(message)
    with suppress(ConnectionClosed):
        await connection.recv()
    return connection.close_code


async def test_a_websocket_whose_caller_does_not_read_to_the_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "bytes": bytes(2**26)})

    def lose(self: GuardedWebSocket, error: Exception | None) -> None:
        connection_lost(self, error)
        lost.set()

    lost = asyncio.Event()
    connection_lost = GuardedWebSocket.connection_lost
    monkeypatch.setattr(GuardedWebSocket, "connection_lost", lose)
    async with listening(talk, linger=0.01) as at, dial(at) as robot:
        robot.transport.pause_reading()
        await asyncio.wait_for(lost.wait(), HANG)
        robot.transport.abort()


async def test_bytes_of_a_message_that_arrives_are_counted_until_the_app_takes_it() -> None:
    gate = asyncio.Event()
    async with listening() as at, dial(at, max_size=None) as robot:
        in_flight = at.guard.bytes_in_flight
        await robot.ping()
        await holds(lambda: in_flight.bytes == 0)
        sending = asyncio.create_task(robot.send(parts(100_000, 200_000, gate=gate)))
        await holds(lambda: in_flight.bytes > 300_000)
        gate.set()
        assert len(await robot.recv()) == 300_003
        await sending
        assert in_flight.bytes == 0


async def test_bytes_of_a_message_whose_caller_has_gone_are_counted_no_more() -> None:
    gate = asyncio.Event()
    async with listening() as at:
        async with dial(at) as robot:
            sending = asyncio.create_task(robot.send(parts(100_000, gate=gate)))
            await holds(lambda: at.guard.bytes_in_flight.bytes > 100_000)
            robot.transport.abort()
            sending.cancel()
            await asyncio.wait([sending])
        await holds(lambda: at.guard.bytes_in_flight.bytes == 0)


async def test_a_message_that_is_more_than_all_may_have_in_flight_is_put_off() -> None:
    gate = asyncio.Event()
    async with (
        listening(most_bytes=150_000) as at,
        dial(at) as first,
        dial(at) as second,
    ):
        sending = asyncio.create_task(first.send(parts(100_000, gate=gate)))
        await holds(lambda: at.guard.bytes_in_flight.bytes > 100_000)
        assert await code_after(second, bytes(100_000)) == 1013
        gate.set()
        await sending
        assert len(await first.recv()) == 100_003


async def test_messages_are_handed_over_as_they_come_in_their_order_and_counted_until_then() -> None:
    def take(message: bytes) -> bool:
        if busy:
            return False
        counted.append(in_flight.bytes)
        taken.append(message)
        return True

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        scope["extensions"][DIRECT]["receive"](take)
        await send({"type": "websocket.send", "text": "ready"})
        while True:
            await gate.wait()
            if (message := await receive())["type"] != "websocket.receive":
                return
            taken.append(message["bytes"])
            busy.clear()

    busy: list[bool] = []
    taken: list[bytes] = []
    counted: list[int] = []
    gate = asyncio.Event()
    messages = [bytes([number]) * 1000 for number in range(9)]
    frames = [Frame(Opcode.BINARY, message).serialize(mask=True) for message in messages]
    size = len(frames[0])
    async with listening(app) as at, dial(at) as robot:
        in_flight = at.guard.bytes_in_flight
        assert await robot.recv() == "ready"
        robot.transport.write(frames[0] + frames[1] + frames[2][:500])
        await holds(lambda: len(taken) == 2)
        assert counted == [500 + 2 * size - 1000, 500 + 2 * size - 2000]
        assert in_flight.bytes == 500
        busy.append(True)
        robot.transport.write(frames[2][500:])
        await holds(lambda: in_flight.bytes == size)
        busy.clear()
        robot.transport.write(b"".join(frames[3:5]))  # behind one that waits
        gate.set()
        await holds(lambda: len(taken) == 5)
        await holds(lambda: in_flight.bytes == 0)
        robot.transport.write(b"".join(frames[5:]))
        await holds(lambda: taken == messages)
        assert in_flight.bytes == 0


async def test_a_message_has_a_bounded_number_of_parts() -> None:
    gate = asyncio.Event()
    gate.set()
    async with (
        listening(max_fragments=8) as at,
        dial(at) as good,
        dial(at) as bad,
    ):
        await good.send(parts(*[1] * 6, gate=gate))
        assert len(await good.recv()) == 9
        assert await code_after(bad, parts(*[1] * 20, gate=gate)) == 1008
        assert await good.ping()


async def test_a_handshake_that_can_not_be_read_is_refused() -> None:
    head = b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    async with listening() as at, connect(at.port) as client:
        client.say(head + b"x: y\r\n" * 200 + b"\r\n")  # more headers than websockets takes
        assert (await client.heard()).startswith(b"HTTP/1.1 400 ")
        assert at.guard.bytes_in_flight.bytes == 0


async def test_a_listener_closes_idle_connections_at_once_and_others_after_their_reply() -> None:
    gate, entered = asyncio.Event(), asyncio.Event()

    async def gated(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            entered.set()
            await gate.wait()
        await echo(scope, receive, send)

    async with listening(gated) as at, connect(at.port) as idle, connect(at.port) as silent, connect(at.port) as busy:
        await idle.ask()
        busy.say(GET.replace(b"GET", b"POST"))
        await entered.wait()
        closing = asyncio.create_task(at.listener.close(HANG))
        assert await idle.heard() == b""
        assert await silent.heard() == b""
        gate.set()
        assert (await busy.heard()).endswith(b"ok")
        await closing
        with pytest.raises(ConnectionRefusedError):
            async with connect(at.port):
                pass


async def test_a_listener_cuts_requests_that_are_not_answered_in_time() -> None:
    entered = asyncio.Event()

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    async with listening(stuck) as at, connect(at.port) as busy:
        busy.say(GET)
        await entered.wait()
        await at.listener.close(0.0)
        assert await busy.heard() == b""


async def test_a_websocket_that_is_refused_is_not_taken_for_a_mistake_of_the_app(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"no", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"body"})

    async with listening(refuse) as at:
        with pytest.raises(InvalidStatus) as refused:
            await dial(at)
        assert refused.value.response.body == b"nobody"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
