"""What callers over HTTP are told when something goes wrong: each status with its body, over real connections."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import pytest
from tensordict import TensorDictBase

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import GatedModel
from aioinfer.web import App, create_app
from aioinfer.web.limits import Limits
from tests.limits import HANG
from tests.web.hosting import hosted
from tests.web.listening import listening
from tests.web.robots import act, until

BODY = json.dumps({"state": [3.0] * 8}).encode()
OIP = "/v2/models/policy/infer"
OIP_BODY = json.dumps({"inputs": [{"name": "state", "shape": [1, 8], "datatype": "FP32", "data": [3.0] * 8}]}).encode()
INFER = pytest.mark.parametrize(("path", "body"), [("/act", BODY), (OIP, OIP_BODY)], ids=["act", "oip"])


class Reply(NamedTuple):
    """A response of HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """What it says, where it says nothing else."""
        said = json.loads(self.body)
        assert list(said) == ["error"], said
        assert self.headers["content-type"] == "application/json"
        assert type(said["error"]) is str
        return str(said["error"])


class Connection:
    """A connection, of which the test says each byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    def head(self, method: str, path: str, *lines: str, version: str = "1.1") -> None:
        more = "".join([f"{line}\r\n" for line in lines]).encode()
        self.say(f"{method} {path} HTTP/{version}\r\nhost: localhost\r\n".encode(), more, b"\r\n")

    def post(self, path: str, body: bytes = BODY, *lines: str, version: str = "1.1") -> None:
        self.head("POST", path, f"content-length: {len(body)}", *lines, version=version)
        self.say(body)

    async def reply(self, *, bodiless: bool = False) -> Reply:
        async with asyncio.timeout(HANG):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            headers = {name.lower(): value.strip() for name, _, value in [line.partition(":") for line in lines]}
            length = 0 if bodiless else int(headers.get("content-length", "0"))
            return Reply(int(first.split()[1]), headers, await self.reader.readexactly(length))

    async def asked(self, path: str, body: bytes = BODY, *lines: str) -> Reply:
        self.post(path, body, *lines)
        return await self.reply()

    async def is_good(self) -> None:
        """Check that the next request on the connection is answered."""
        reply = await self.asked("/act")
        assert reply.status == 200, reply
        assert json.loads(reply.body)["actions"][0][0] == 6.0

    async def is_closed(self) -> None:
        async with asyncio.timeout(HANG):
            try:
                assert await self.reader.read() == b""
            except ConnectionResetError:
                pass


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


Talking: TypeAlias = Callable[..., AbstractAsyncContextManager[tuple[App, str, Connection]]]


@asynccontextmanager
async def talk(
    by_asgi: bool, policy: Any = act, *, max_pending: int = 4096, **options: Any
) -> AsyncIterator[tuple[App, str, Connection]]:
    server = InferenceServer(policy, ThreadingTransport(), max_pending=max_pending)
    app = create_app(server, **options)
    if by_asgi:
        async with hosted(app) as url, connection(url) as one:
            yield app, url, one
        return
    async with server, listening(app, whole=lambda: app) as at:
        url = f"http://127.0.0.1:{at.port}"
        async with connection(url) as one:
            yield app, url, one
    app.close()


@pytest.fixture(params=[True, False], ids=["asgi", "whole"])
def talking(request: pytest.FixtureRequest) -> Talking:
    """Serves a policy, and opens a connection: by ASGI, or past it where a request comes whole."""
    return partial(talk, request.param)


@pytest.fixture
def model() -> Iterator[GatedModel]:
    gated = GatedModel(act, key="state")
    yield gated
    gated.open()


@asynccontextmanager
async def computing(url: str, model: GatedModel) -> AsyncIterator[None]:
    """Let the model be in a pass of another caller, up to the end of the block or until it is opened."""
    async with connection(url) as first:
        first.post("/act", BODY.replace(b"3.0", b"0.0"), "x-deadline-seconds: 1000")
        await until(model.entered.is_set)
        yield
        model.open()
        assert (await first.reply()).status == 200


# -- requests that are wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/act", OIP])
async def test_what_is_malformed_is_400_and_the_connection_stays(talking: Talking, path: str) -> None:
    async with talking() as (_, _, one):
        for body in (b"", b"{", b"[]", b"null", b"1", b'"\xff"', b"\x80\x04\x95", b"[" * 5000, b'{"state": [1, [2]]}'):
            reply = await one.asked(path, body)
            assert (reply.status, bool(reply.error)) == (400, True), body[:20]
            await one.is_good()


async def test_paths_that_are_nobodys_are_404(talking: Talking) -> None:
    async with talking() as (_, _, one):
        for path in (
            *("/unknown", "//", "//act", "/act/", "/ACT", "/v2/../act", "/v2/%2e%2e/act", "/%2e%2e/%2e%2e/etc/passwd"),
            *("/v2/models/other/infer", "/v2/models/policy/versions/2/infer", "/act%00", "/%00", "/%ff%fe", "/;act"),
            *("/" + "a" * 4000, "/act%2f", "/v2//models/policy", "/act%20"),
        ):
            one.head("GET", path)
            reply = await one.reply()
            assert (reply.status, bool(reply.error)) == (404, True), path
            await one.is_good()


async def test_other_methods_are_405_and_say_which_one_is_allowed(talking: Talking) -> None:
    async with talking() as (_, _, one):
        for path, allowed, methods in (
            ("/act", {"POST"}, ("GET", "PUT", "DELETE", "OPTIONS", "PATCH")),
            (OIP, {"POST"}, ("GET", "PUT", "OPTIONS")),
            ("/healthz", {"GET", "HEAD"}, ("POST", "DELETE", "OPTIONS")),
            ("/stats", {"GET", "HEAD"}, ("POST", "OPTIONS")),
        ):
            for method in methods:
                one.head(method, path, "content-length: 0")
                reply = await one.reply()
                assert (reply.status, reply.error) == (405, "Method Not Allowed"), (path, method)
                assert set(reply.headers["allow"].split(", ")) == allowed
                await one.is_good()


async def test_a_head_has_the_status_and_no_body(talking: Talking) -> None:
    async with talking() as (_, _, one):
        for path, status in (("/healthz", 200), ("/livez", 200), ("/", 200), ("/unknown", 404), ("/act", 405)):
            one.head("HEAD", path)
            assert (await one.reply(bodiless=True)).status == status, path
            await one.is_good()


# -- bodies -------------------------------------------------------------------------------------------------------

SMALL = Limits(max_message_size=4096)


@INFER
async def test_a_body_that_is_too_large_is_413_before_it_is_read(talking: Talking, path: str, body: bytes) -> None:
    async with talking(limits=SMALL) as (app, url, one):
        for length in ("4097", "99999999999", "9" * 18):
            async with connection(url) as other:
                other.head("POST", path, f"content-length: {length}")
                reply = await other.reply()
                assert (reply.status, reply.error) == (413, "a request has at most 4096 bytes")
                assert reply.headers["connection"] == "close"
                await other.is_closed()
        one.head("POST", path, "transfer-encoding: chunked")
        one.say(*[b"800\r\n" + b" " * 2048 + b"\r\n" for _ in range(3)])
        reply = await one.reply()
        assert (reply.status, reply.error) == (413, "a request has at most 4096 bytes")
        await until(lambda: not app.front.bytes_in_flight.bytes)


@INFER
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_what_inflates_beyond_the_limit_is_413(talking: Talking, path: str, body: bytes, encoding: str) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    bomb = compress(b" " * 2**22)
    async with talking(limits=Limits(max_message_size=2**15)) as (app, url, one):
        assert len(bomb) < 2**15
        reply = await one.asked(path, bomb, f"content-encoding: {encoding}")
        assert (reply.status, reply.error) == (413, "a request has at most 32768 bytes")
        async with connection(url) as other:
            for bad in (b"no", compress(body)[:-3], b""):
                reply = await other.asked(path, bad, f"content-encoding: {encoding}")
                assert (reply.status, bool(reply.error)) == (400, True)
            assert (await other.asked(path, compress(body), f"content-encoding: {encoding.upper()}")).status == 200
            assert (await other.asked(path, body, "content-encoding: identity")).status == 200
        await until(lambda: not app.front.bytes_in_flight.bytes)


@INFER
async def test_other_encodings_are_415(talking: Talking, path: str, body: bytes) -> None:
    async with talking() as (_, _, one):
        for encoding in ("br", "zstd", "gzip, gzip", "x" * 500, "\u00e9"):
            reply = await one.asked(path, body, f"content-encoding: {encoding}")
            assert (reply.status, "send it plain, or as gzip" in reply.error) == (415, True)
            await one.is_good()


@INFER
async def test_a_body_that_takes_too_long_is_408(talking: Talking, path: str, body: bytes) -> None:
    async with talking(limits=Limits(body_timeout=0.1)) as (app, _, one):
        one.head("POST", path, f"content-length: {len(body)}")
        one.say(body[:10])
        reply = await one.reply()
        assert (reply.status, reply.error) == (408, "the request took more than 0.1 seconds to arrive")
        assert reply.headers["connection"] == "close"
        await one.is_closed()
        await until(lambda: not app.front.bytes_in_flight.bytes)


async def test_a_caller_that_waits_to_be_told_to_go_on_is_told(talking: Talking) -> None:
    async with talking() as (_, _, one):
        one.head("POST", "/act", f"content-length: {len(BODY)}", "expect: 100-continue")
        assert (await one.reply()).status == 100
        one.say(BODY)
        assert (await one.reply()).status == 200
        await one.is_good()


async def test_callers_of_http_1_0_are_answered(talking: Talking) -> None:
    async with talking() as (_, url, one):
        one.post("/act", BODY, version="1.0")
        assert (await one.reply()).status == 200
        await one.is_closed()
        async with connection(url) as other:
            other.head("GET", "/unknown", version="1.0")
            assert (await other.reply()).status == 404
            await other.is_closed()


# -- servers that do not answer -----------------------------------------------------------------------------------


@INFER
async def test_a_full_queue_is_429_and_says_when_to_ask_again(
    talking: Talking, path: str, body: bytes, model: GatedModel
) -> None:
    async with talking(model, max_pending=1) as (app, url, one), computing(url, model), connection(url) as waits:
        waits.post(path, body)
        await until(lambda: app.front.stats.inflight == 2)
        reply = await one.asked(path, body)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert "queue is full" in reply.error
        model.open()
        assert (await waits.reply()).status == 200
        await one.is_good()


@INFER
async def test_too_many_bytes_in_flight_are_429(talking: Talking, path: str, body: bytes, model: GatedModel) -> None:
    async with talking(model, limits=Limits(max_bytes_in_flight=len(body) + 20)) as (app, url, one):
        async with computing(url, model):
            reply = await one.asked(path, body)
            assert (reply.status, reply.headers["retry-after"]) == (429, "1")
            assert "try again later" in reply.error
        await until(lambda: not app.front.bytes_in_flight.bytes)
        await one.is_good()


@INFER
async def test_a_server_that_does_not_run_or_is_drained_is_503(talking: Talking, path: str, body: bytes) -> None:
    app = create_app(InferenceServer(act, ThreadingTransport()))
    async with hosted(app, lifespan="off") as url, connection(url) as one:
        reply = await one.asked(path, body)
        assert (reply.status, reply.error) == (503, "the server does not run")
    async with talking() as (app, _, one):
        await one.is_good()
        await app.drain()
        for _ in range(2):
            reply = await one.asked(path, body)
            assert (reply.status, reply.error) == (503, "the server is shutting down")


@INFER
async def test_a_deadline_that_passes_is_504(talking: Talking, path: str, body: bytes, model: GatedModel) -> None:
    async with talking(model, deadline=0.05) as (app, url, one), computing(url, model):
        reply = await one.asked(path, body)
        assert (reply.status, reply.error) == (504, "no reply within 0.05 seconds of the request's arrival")
        model.open()
        await until(lambda: not app.front.stats.inflight)
    assert model.seen == {0}


class SecretError(Exception):
    pass


def fails(td: TensorDictBase) -> TensorDictBase:
    raise SecretError("no actions today")


@INFER
@pytest.mark.parametrize("debug", [False, True])
async def test_an_error_of_the_model_is_500_with_an_id_that_the_log_has(
    talking: Talking, path: str, body: bytes, debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with talking(fails, debug=debug) as (_, _, one):
        for _ in range(2):
            caplog.clear()
            reply = await one.asked(path, body)
            assert reply.status == 500
            assert "SecretError" in reply.error
            assert "no actions today" in reply.error
            (error_id,) = re.findall(r"\(error id ([0-9a-f]{8})\)", reply.error)
            (record,) = [record for record in caplog.records if error_id in record.getMessage()]
            assert record.exc_info is not None
            assert ("Traceback" in reply.error, __file__ in reply.error) == (debug, debug)


# -- callers that go ----------------------------------------------------------------------------------------------


@INFER
async def test_a_request_whose_caller_goes_while_it_waits_is_not_computed(
    talking: Talking, path: str, body: bytes, model: GatedModel
) -> None:
    async with talking(model) as (app, url, one), computing(url, model):
        one.post("/act", BODY.replace(b"3.0", b"1.0"))
        async with connection(url) as gone:
            gone.post(path, body)
            await until(lambda: app.front.stats.inflight == 3)
        await until(lambda: app.front.stats.inflight == 2)
        model.open()
        assert json.loads((await one.reply()).body)["actions"][0][0] == 2.0
        await until(lambda: not app.front.bytes_in_flight.bytes)
    assert model.seen == {0, 1}


@INFER
async def test_a_caller_that_goes_while_its_request_is_computed_takes_nothing_from_others(
    talking: Talking, path: str, body: bytes, model: GatedModel
) -> None:
    async with talking(model) as (app, url, one):
        async with connection(url) as gone:
            gone.post(path, body)
            await until(model.entered.is_set)
        await until(lambda: not app.front.stats.inflight)
        one.post("/act")
        await until(lambda: app.front.stats.inflight == 1)
        model.open()
        assert (await one.reply()).status == 200
        await one.is_good()
