"""Requests over HTTP that come whole are answered without ASGI, and nobody can tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, InferenceTransport, MPTransport, ProcessSlotTransport, ThreadingTransport
from aioinfer.serve.whole_requests import KnownHeads
from aioinfer.testing import GatedModel
from aioinfer.web.app import App, create_app
from aioinfer.web.asgi import Receive, Scope, Send
from aioinfer.web.limits import Limits
from tests.limits import HANG
from tests.web.listening import Clock, Listening, listening
from tests.web.robots import until

PATH = "/v2/models/policy/infer"
INPUT = {"name": "observation", "datatype": "FP32", "shape": [1, 2]}


def double(td: TensorDictBase) -> TensorDictBase:
    assert (td["observation"] >= 0).all(), "below 0"
    return TensorDict({"action": 2 * td["observation"]}, td.batch_size)


class Response(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """A connection of HTTP, of which the test says each byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def response(self) -> Response:
        async with asyncio.timeout(HANG):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).strip().split(b"\r\n")
            headers = dict([line.split(b": ", 1) for line in lines])
            body = await self.reader.readexactly(int(headers[b"content-length"]))
        return Response(int(first.split()[1]), headers, body)

    async def ask(self, request: bytes) -> Response:
        self.writer.write(request)
        return await self.response()

    async def is_closed(self) -> bool:
        async with asyncio.timeout(HANG):
            return await self.reader.read() == b""


class Served(NamedTuple):
    app: App
    at: Listening
    by_asgi: list[str]
    """The paths of requests that went by ASGI."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.at.port)
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()


@asynccontextmanager
async def served(
    model: Any = double,
    transport: InferenceTransport | None = None,
    spec: TensorDict | None = None,
    clock: Clock | None = None,
    is_there: Callable[[], bool] = lambda: True,
    **options: Any,
) -> AsyncIterator[Served]:
    by_asgi: list[str] = []
    async with InferenceServer(model, transport or ThreadingTransport(), request_spec=spec) as server:
        app = create_app(server, **options)

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            by_asgi.append(scope["path"])
            await app(scope, receive, send)

        async with listening(watched, whole=lambda: app if is_there() else None, clock=clock or Clock()) as at:
            yield Served(app, at, by_asgi)
        app.close()


def post(body: bytes, path: str = PATH, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", *headers]
    if not any("transfer-encoding" in line.lower() for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def infer(value: float, *headers: str, **message: Any) -> bytes:
    return post(json.dumps({"inputs": [{**INPUT, "data": [value, 0.0]}], **message}).encode(), PATH, *headers)


def act(value: float, *headers: str) -> bytes:
    return post(json.dumps({"observation": [value, 0.0]}).encode(), "/act", *headers)


def binary(*values: float) -> bytes:
    rows = np.array([[value, 0.0] for value in values], np.float32)
    tensor = {**INPUT, "shape": rows.shape, "parameters": {"binary_data_size": rows.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return post(head + rows.tobytes(), PATH, f"Inference-Header-Content-Length: {len(head)}")


def check(response: Response, *values: float) -> None:
    assert response.status == 200, response
    head = response.headers.get(b"inference-header-content-length")
    if head is not None:
        actions = np.frombuffer(response.body, np.float32, 2 * len(values), int(head))[::2].tolist()
    elif b'"outputs"' in response.body:
        actions = next(output["data"] for output in response.json["outputs"] if output["name"] == "action")[::2]
    else:
        actions = response.json["action"][::2]
    assert actions == [2 * value for value in values]


SPEC = TensorDict({"observation": np.zeros(2, np.float32)}, [])


REPLY = TensorDict({"action": np.zeros(2, np.float32)}, [])


@pytest.mark.parametrize(
    "transport", [ThreadingTransport, MPTransport, partial(ProcessSlotTransport, SPEC, REPLY, num_slots=4)]
)
async def test_all_formats_are_answered_without_asgi(transport: Any) -> None:
    async with served(transport=transport()) as to, to.connect() as connection:
        for value in range(3):
            check(await connection.ask(infer(value)), value)
            check(await connection.ask(binary(value)), value)
            check(await connection.ask(act(value)), value)
        assert (await connection.ask(infer(1, id="seven"))).json["id"] == "seven"
        assert to.by_asgi == []
        assert sum(to.app.front.stats.requests.values()) == 10
        assert to.app.front.stats.inflight == to.app.front.bytes_in_flight.bytes == 0


async def test_several_rows_make_one_request() -> None:
    async with served(spec=SPEC) as to, to.connect() as connection:
        check(await connection.ask(binary(1, 2, 3)), 1, 2, 3)
        assert to.by_asgi == []


async def test_errors_are_told_and_the_connection_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as to, to.connect() as connection:
        failed = await connection.ask(act(-1))
        assert (failed.status, "below 0" in failed.json["error"]) == (500, True)
        malformed = await connection.ask(post(b"{"))
        assert (malformed.status, list(malformed.json)) == (400, ["error"])
        nested = await connection.ask(post(b'{"observation":' + b"[" * 500 + b"]" * 500 + b"}", "/act"))
        assert nested.status == 400
        check(await connection.ask(act(1)), 1)
        assert to.by_asgi == []
        await until(lambda: to.app.front.stats.requests["act", "error"] == 1)
        assert to.app.front.stats.inflight == to.app.front.bytes_in_flight.bytes == 0


async def test_a_head_that_is_repeated_serves_another_body() -> None:
    async with served() as to, to.connect() as first, to.connect() as second:
        for value in range(1, 9):
            check(await first.ask(act(value)), value)
            check(await second.ask(binary(value + 10)), value + 10)
            check(await second.ask(act(value + 20)), value + 20)
        assert (await first.ask(post(b"{" + b" " * (len(act(1)) - len(post(b"")) - 2), "/act"))).status == 400
        check(await first.ask(act(1)), 1)
        assert to.by_asgi == []


@pytest.mark.parametrize("cuts", [(10,), (-5,), (10, -5), (-1,)], ids=str)
async def test_what_begins_with_a_head_that_is_repeated_and_is_not_whole_goes_by_the_parser(
    cuts: tuple[int, ...],
) -> None:
    async with served() as to, to.connect() as connection:
        check(await connection.ask(act(1)), 1)
        for value in (2, 3):
            request = act(value)
            start = 0
            for cut in cuts:
                reads = len(to.by_asgi)
                connection.writer.write(request[start : len(request) + cut if cut < 0 else cut])
                start = len(request) + cut if cut < 0 else cut
                if cut < 0:
                    await until(lambda reads=reads: len(to.by_asgi) > reads)  # type: ignore[misc]
                else:
                    await until(lambda: to.at.guard.awaited == 1)
            check(await connection.ask(request[start:]), value)
            connection.writer.write(act(4) + act(5))
            check(await connection.response(), 4)
            check(await connection.response(), 5)
            check(await connection.ask(act(6)), 6)


async def test_a_head_that_is_repeated_is_checked_again() -> None:
    async with served(tokens=["secret", "public"]) as to, to.connect() as connection:
        for _ in range(3):
            check(await connection.ask(act(1, "Authorization: Bearer secret")), 1)
            check(await connection.ask(act(1, "Authorization: Bearer public")), 1)
            assert (await connection.ask(act(1, "Authorization: Bearer sesame"))).status == 401
            assert (await connection.ask(act(1))).status == 401
            assert (await connection.ask(act(1, "Authorization: Bearer secret", "Origin: http://a"))).status == 403
        assert to.by_asgi == []


async def test_a_connection_whose_first_head_was_known_is_served_for_as_long_as_any() -> None:
    clock = Clock()
    model = GatedModel(double)
    model.open()
    async with served(model, clock=clock) as to, to.connect() as before, to.connect() as connection:
        check(await before.ask(act(1)), 1)
        assert to.at.guard.awaited == 1
        model.close()
        connection.writer.write(act(2))
        await until(model.entered.is_set)
        connection.writer.write(b"\r\n")  # as some write behind a body
        check_later = asyncio.create_task(connection.response())
        await until(lambda: to.at.guard.awaited == 0)
        clock.now += 20.0
        assert to.at.guard.close_late() is None
        model.open()
        check(await check_later, 2)
        check(await connection.ask(act(3)), 3)
        clock.now += 75.0
        to.at.guard.close_idle()
        assert await connection.is_closed()


async def test_a_connection_that_was_refused_gets_nothing_more_not_even_by_a_head_that_is_known() -> None:
    clock = Clock()
    model = GatedModel(double)
    model.open()
    async with served(model, clock=clock) as to, to.connect() as good, to.connect() as refused:
        check(await good.ask(act(1)), 1)
        refused.writer.write(b"\r\n" * 2**15 + b"\r\n")
        async with asyncio.timeout(HANG):
            assert await refused.reader.readuntil(b"\r\n\r\n") == (
                b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
        refused.writer.write(act(2))
        check(await good.ask(act(3)), 3)
        assert await refused.is_closed()
        assert model.seen == {1, 3}
        assert to.at.guard.awaited == 1
        clock.now += 10.0
        assert to.at.guard.close_late() is None
        assert to.at.guard.awaited == 0
        assert to.app.front.stats.inflight == to.app.front.bytes_in_flight.bytes == 0


async def test_a_head_that_is_known_waits_for_the_app_as_any_other() -> None:
    there = True
    async with served(is_there=lambda: there) as to, to.connect() as connection:
        check(await connection.ask(act(1)), 1)
        there = False
        check(await connection.ask(act(2)), 2)
        assert to.by_asgi == ["/act"]


def test_heads_are_kept_up_to_a_number_and_a_size() -> None:
    heads = KnownHeads(max_count=2, max_size=100)
    requests = [post(b"abc", "/act", f"X-Id: {number}") for number in range(3)]
    long = post(b"abc", "/act", "X-Id: " + "9" * 100)
    for request in (*requests, long, requests[2] + b"d", requests[2][:-1], b"\r\n\r\n" + requests[2], b""):
        heads.add(request, b"/act", {}, 3)
    assert [heads.find(request) is not None for request in requests] == [False, True, True]
    found = heads.find(requests[2])
    assert found is not None
    assert (found[0].path, found[0].body_size, found[1]) == (b"/act", 3, b"abc")
    for other in (long, requests[2] + b"d", requests[2][:-1], b"\r\n\r\n" + requests[2], b"", b"\r\n\r\n"):
        assert heads.find(other) is None


async def test_who_may_not_ask_is_told() -> None:
    async with served(tokens=["secret"]) as to, to.connect() as connection:
        refused = await connection.ask(act(1))
        assert (refused.status, refused.headers[b"www-authenticate"]) == (401, b"Bearer")
        check(await connection.ask(act(1, "Authorization: Bearer secret")), 1)
        assert (await connection.ask(act(1, "Authorization: Bearer secret", "Origin: http://a"))).status == 403
        assert to.by_asgi == []


async def test_a_connection_that_was_answered_at_once_may_be_idle_for_longer_than_a_head_may_take() -> None:
    clock = Clock()
    async with served(clock=clock) as to, to.connect() as connection:
        for ask in (post(b"{"), act(1)):
            assert (await connection.ask(ask)).status in (200, 400)
            assert to.at.guard.awaited == 0
            clock.now += 70.0
            assert to.at.guard.close_late() is None
            assert to.at.guard.close_idle() == 5.0
        clock.now += 5.0
        assert to.at.guard.close_idle() is None
        assert await connection.is_closed()


@pytest.mark.parametrize(
    "request_",
    [
        post(b'{"observation": [1, 0]}', "/act", "Connection: close"),
        post(b'{"observation": [1, 0]}', "/act", version="1.0"),
        post(b'17\r\n{"observation": [1, 0]}\r\n0\r\n\r\n', "/act", "Transfer-Encoding: chunked"),
        post(b'{"observation": [1, 0]}', "/act?a=b"),
    ],
    ids=["close", "1.0", "chunked", "query"],
)
async def test_what_is_not_plain_goes_by_asgi(request_: bytes) -> None:
    async with served() as to, to.connect() as connection:
        check(await connection.ask(request_), 1)
        assert to.by_asgi == ["/act"]


async def test_a_body_that_comes_in_pieces_goes_by_asgi() -> None:
    request = binary(1)
    async with served() as to:
        for number, cut in enumerate((len(request) - 16, len(request) - 1), 1):
            async with to.connect() as connection:
                connection.writer.write(request[:cut])
                await until(lambda number=number: len(to.by_asgi) == number)  # type: ignore[misc]
                check(await connection.ask(request[cut:]), 1)
                check(await connection.ask(request), 1)
                assert len(to.by_asgi) == number


async def test_requests_that_do_not_wait_for_replies_are_answered_in_order() -> None:
    get = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with served() as to, to.connect() as connection:
        for _ in range(2):
            connection.writer.write(act(1) + post(b"{") + infer(2) + get + binary(3) + act(4) + act(5)[:-5])
            check(await connection.response(), 1)
            assert (await connection.response()).status == 400
            check(await connection.response(), 2)
            assert (await connection.response()).status == 200
            check(await connection.response(), 3)
            check(await connection.response(), 4)
            connection.writer.write(act(5)[-5:])
            check(await connection.response(), 5)
        connection.writer.write(post(b"{") + act(1) + act(2))
        assert (await connection.response()).status == 400
        check(await connection.response(), 1)
        check(await connection.response(), 2)


async def test_the_request_of_a_caller_that_has_gone_is_not_computed() -> None:
    model = GatedModel(double)
    async with served(model) as to, to.connect() as first, to.connect() as second, to.connect() as third:
        server = to.app.front.backend.server
        assert isinstance(server, InferenceServer)
        first.writer.write(act(1))
        await until(model.entered.is_set)
        second.writer.write(act(2) + act(3))  # and one that would come after it
        third.writer.write(act(4, "X-Deadline-Seconds: 1000"))
        await until(lambda: server.stats().pending == 2)
        for gone in (second, third):
            gone.writer.transport.abort()
        await until(lambda: to.app.front.stats.requests["act", "cancelled"] == 2)
        model.open()
        check(await first.response(), 1)
        check(await first.ask(act(5)), 5)
        assert model.seen == {1, 5}
        assert to.app.front.stats.inflight == to.app.front.bytes_in_flight.bytes == 0


async def test_a_drain_waits_for_what_is_under_way_and_the_connection_is_closed_then() -> None:
    model = GatedModel(double)
    async with served(model) as to, to.connect() as connection, to.connect() as late:
        connection.writer.write(act(1))
        await until(model.entered.is_set)
        draining = asyncio.create_task(to.app.drain())
        await until(lambda: bool(to.app.front.draining))
        assert (await late.ask(act(2))).status == 503
        closing = asyncio.create_task(to.at.listener.close(HANG))
        assert await late.is_closed()
        assert not draining.done()
        model.open()
        response = await connection.response()
        check(response, 1)
        assert response.headers[b"connection"] == b"close"
        assert await connection.is_closed()
        assert await draining
        await closing


async def test_deadlines_and_sessions_are_kept() -> None:
    async with served(deadline=1000.0) as to, to.connect() as connection:
        check(await connection.ask(act(1)), 1)
        session = {"observation": [1.0, 0.0], "session_id": "a", "reset": True}
        check(await connection.ask(post(json.dumps(session).encode(), "/act")), 1)
        assert len(to.app.front.sessions) == 1
        assert to.by_asgi == []
    model = GatedModel(double)
    async with served(model) as to, to.connect() as first, to.connect() as second:
        first.writer.write(act(1))
        await until(model.entered.is_set)
        late = await second.ask(act(2, "X-Deadline-Seconds: .01"))
        assert late.status == 504
        model.open()
        check(await first.response(), 1)
        check(await second.ask(act(3)), 3)
        assert model.seen == {1, 3}


async def test_a_message_that_is_too_large_is_refused() -> None:
    async with served(limits=Limits(max_message_size=100)) as to, to.connect() as connection:
        check(await connection.ask(act(1)), 1)
        refused = await connection.ask(post(b" " * 101, "/act"))
        assert (refused.status, refused.headers[b"connection"]) == (413, b"close")
        assert await connection.is_closed()


@pytest.mark.parametrize("rounds", [10, pytest.param(150, marks=pytest.mark.stress)])
async def test_nobody_gets_the_reply_of_another(rounds: int) -> None:
    async def ask(to: Served, caller: int) -> None:
        async with to.connect() as connection:
            for number in range(rounds):
                value = 1000 * caller + number
                check(await connection.ask((infer, binary, act)[number % 3](value)), value)

    async with served() as to:
        await asyncio.gather(*[ask(to, caller) for caller in range(64)])
        assert to.by_asgi == []
