"""Clients of ``connect("ws://...")``."""

from __future__ import annotations

import asyncio
import pickle
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.routing import Mount
from tensordict import NonTensorData, TensorDict, TensorDictBase

from aioinfer import (
    AsyncInferenceClient,
    ClientClosedError,
    InferenceServer,
    InvalidRequestError,
    ModelError,
    PeerDiedError,
    RemoteServer,
    ServerClosedError,
    ServerOverloadedError,
    ThreadingTransport,
    connect,
)
from aioinfer.errors import AccessDeniedError
from aioinfer.testing import CHECKS, AwaitingCallers, BlockingCallers, GatedModel, TransportHarness, double, request
from aioinfer.testing.callers import is_double
from aioinfer.transports.network.connection import connection_of
from aioinfer.transports.network.link import PING_INTERVAL, Address
from aioinfer.web import App, Limits, create_app
from tests.limits import HANG
from tests.process_workers import Child, use
from tests.web.hosting import hosted, reserved_port
from tests.web.networked import networked, over_network
from tests.web.robots import until

ON_ITS_WAY = {"waiting_for_room_ends_with_its_deadline": "a withdrawal is on its way when the check opens its gate"}
SKIPPED = {name: [pytest.mark.skip(reason=reason)] for name, reason in ON_ITS_WAY.items()}
CHECKED = [pytest.param(check, id=check.__name__, marks=SKIPPED.get(check.__name__, [])) for check in CHECKS]


@pytest.mark.parametrize("kind", [BlockingCallers, AwaitingCallers])
@pytest.mark.parametrize("check", CHECKED)
def test_the_contract_of_transports_holds_over_a_network(
    check: Callable[[TransportHarness], None], kind: Callable[[Any], Any]
) -> None:
    callers: Any = over_network(kind)
    check(TransportHarness(ThreadingTransport, callers, drops_cancelled=False, remote=True))


class Recorded:
    """An app that counts the messages of its WebSockets."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.received = self.sent = self.connections = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def received() -> Any:
            message = await receive()
            self.received += message["type"] == "websocket.receive"
            return message

        async def sent(message: Any) -> None:
            self.sent += message["type"] == "websocket.send"
            await send(message)

        self.connections += scope["type"] == "websocket"
        await self.app(scope, received, sent)


@asynccontextmanager
async def reached(app: Any, *, port: int = 0) -> AsyncIterator[str]:
    """Serve an app inside an ``async with`` block; gives the URL for clients."""
    async with hosted(app, port=port, lifespan="off") as url:
        yield url.replace("http", "ws", 1)


async def connected(url: str, **options: Any) -> RemoteServer:
    return await asyncio.to_thread(partial(connect, url, **options))


async def test_what_tasks_ask_in_one_tick_travels_in_one_message() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        app = Recorded(create_app(server))
        async with reached(app) as url, await connected(url) as remote:
            clients = remote.async_clients(32)
            replies = await asyncio.gather(*(client(request(value)) for value, client in enumerate(clients)))
            assert all(is_double(reply, value) for value, reply in enumerate(replies))
            assert (app.connections, app.received, app.sent) == (1, 1, 2)
            assert server.stats().mean_batch_size == 32


async def test_all_clients_of_a_process_share_one_connection(run_uvloop: Callable[[Any], Any]) -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        app = Recorded(create_app(server))
        async with reached(app) as url, await connected(url) as remote, await connected(url + "/") as again:
            shared = remote.async_client()

            async def ask(start: int) -> None:
                client = again.async_client()
                for value in range(start, start + 20):
                    assert is_double(await client(request(value)), value)
                    assert is_double(await shared(observation=[float(value)] * 3), value)

            def call(start: int) -> None:
                client = remote.client()
                for value in range(start, start + 20):
                    assert is_double(client(request(value), HANG), value)
                    assert is_double(client.submit(request(value)).result(HANG), value)

            await asyncio.gather(
                ask(0),
                *(asyncio.to_thread(asyncio.run, ask(100 * index)) for index in (1, 2)),
                *(asyncio.to_thread(run_uvloop, ask(100 * index)) for index in (3, 4)),
                *(asyncio.to_thread(call, 100 * index) for index in range(5, 9)),
            )
            assert app.connections == 1
            assert await asyncio.to_thread(is_double, await shared(request(1)), 1)
        await until(lambda: app.app.front.stats.connections["stream"] == 0)


@pytest.fixture
def run_uvloop() -> Callable[[Any], Any]:
    uvloop = pytest.importorskip("uvloop")
    run: Callable[[Any], Any] = uvloop.run
    return run


async def test_a_withdrawn_request_is_not_computed() -> None:
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport()) as server:
        app = create_app(server)
        async with reached(app) as url, await connected(url) as remote:
            client, blocking = remote.async_client(), remote.client()
            first = client.submit(request(0))
            await until(model.entered.is_set)
            cancelled, future = client.submit(request(1)), blocking.submit(request(2))
            await until(lambda: server.stats().pending == 2)
            cancelled.cancel()
            future.cancel()
            await until(lambda: server.stats().pending == 0)
            counts = app.front.stats.requests

            def ended() -> int:
                return counts["stream", "cancelled"] + counts["stream", "expired"]

            for call in (partial(client, request(3)), partial(asyncio.to_thread, blocking, request(4))):
                before, seconds = ended(), 0.01
                while ended() == before:  # it may be over before it was sent
                    with pytest.raises(TimeoutError):
                        await call(timeout=seconds)
                    seconds *= 2
            await until(lambda: server.stats().pending == 0)
            waiting = asyncio.create_task(client(request(5)))
            await until(lambda: server.stats().pending == 1)
            waiting.cancel()
            await until(lambda: server.stats().pending == 0)
            model.open()
            assert is_double(await first, 0)
            assert is_double(await client(request(6)), 6)
    assert model.seen == {0, 6}


async def test_a_request_that_is_too_large_fails_alone() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        app = create_app(server, limits=Limits(max_message_size=4096))
        async with reached(app) as url, await connected(url) as remote:
            client = remote.async_client()
            sizes = [10] * 20 + [2000] + [10] * 20 + [900] * 5
            outcomes = await asyncio.gather(*(client(request(1, size=size)) for size in sizes), return_exceptions=True)
            for size, outcome in zip(sizes, outcomes, strict=True):
                if size == 2000:
                    assert isinstance(outcome, InvalidRequestError)
                    assert "the server takes 4096" in str(outcome)
                else:
                    assert not isinstance(outcome, BaseException)
                    assert outcome["action"].shape == (size,)


async def test_no_more_requests_are_under_way_than_the_server_takes() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        app = create_app(server, limits=Limits(max_pending_per_connection=3))
        async with reached(app) as url, await connected(url) as remote:
            client = remote.async_client()
            replies = await asyncio.gather(*(client(request(value)) for value in range(50)))
            assert all(is_double(reply, value) for value, reply in enumerate(replies))
        assert server.stats().mean_batch_size <= 3


async def test_what_waits_to_be_sent_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioinfer.transports.network.client.MAX_BACKLOG", 10_000)
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport()) as server:
        app = create_app(server, limits=Limits(max_pending_per_connection=1))
        async with reached(app) as url, await connected(url) as remote:
            client, blocking = remote.async_client(), remote.client()
            replies = [client.submit(request(0, size=1000)) for _ in range(10)]
            refused = [reply for reply in replies if reply.done()]
            assert 0 < len(refused) < 10
            assert all(isinstance(reply.exception(), ServerOverloadedError) for reply in refused)

            def is_refused() -> bool:
                futures.append(blocking.submit(request(0, size=1000)))
                return bool(futures[-1].done())

            futures: list[Any] = []
            await until(is_refused)
            assert isinstance(futures.pop().exception(), ServerOverloadedError)
            model.open()
            await asyncio.gather(*(reply for reply in replies if reply not in refused))
            await asyncio.gather(*map(asyncio.wrap_future, futures))
            assert is_double(await asyncio.to_thread(blocking, request(1, size=1000)), 1)


# -- what travels ----------------------------------------------------------------------------------------------


async def test_what_was_withdrawn_does_not_wait_to_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioinfer.transports.network.client.MAX_BACKLOG", 2**16)
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport()) as server:
        app = create_app(server, limits=Limits(max_pending_per_connection=1))
        async with reached(app) as url, await connected(url) as remote:
            client = remote.async_client()
            first = client.submit(request(1))
            await until(lambda: model.entered.is_set())
            for _ in range(100):  # of at least 1 KiB each
                withdrawn = client.submit(request(2))
                await asyncio.sleep(0)
                withdrawn.cancel()
                await asyncio.sleep(0)
            connection = connection_of(Address(url), client)
            await until(lambda: connection.backlog == 0)
            last = client.submit(request(3))
            model.open()
            assert is_double(await first, 1)
            assert is_double(await last, 3)
            assert model.batches == [[1], [3]]


async def test_requests_and_replies_of_every_kind_travel() -> None:
    async with (
        InferenceServer(lambda td: td.clone(), ThreadingTransport()) as server,
        reached(create_app(server)) as url,
        await connected(url) as remote,
    ):
        client = remote.async_client()
        asked = TensorDict(
            {
                "half": torch.ones(2, dtype=torch.bfloat16),
                "inner": TensorDict({"x": torch.arange(3), "text": NonTensorData("go left")}),
                "grad": torch.ones(1, requires_grad=True),
            }
        )
        for reply in await asyncio.gather(client(asked), client(asked.clone())):
            assert reply["half"].dtype == torch.bfloat16
            assert reply["inner", "text"] == "go left"
            assert torch.equal(reply["inner", "x"], torch.arange(3))
            assert not reply["grad"].requires_grad
            assert int(reply["policy_version"]) == 0


class PolicyError(Exception):
    pass


async def test_errors_of_the_model_have_their_class_if_it_is_known() -> None:
    errors = {1: ValueError("one"), 2: PolicyError("two"), 3: KeyError("three")}

    def model(td: TensorDictBase) -> TensorDictBase:
        raise errors[int(td["observation"][0, 0])]

    async with (
        InferenceServer(model, ThreadingTransport(), max_batch_size=1) as server,
        reached(create_app(server)) as url,
        await connected(url) as remote,
    ):
        client = remote.async_client()
        with pytest.raises(ValueError, match="one"):
            await client(request(1))
        with pytest.raises(ModelError, match=r"PolicyError: two \(.*error id [0-9a-f]{8}\)"):
            await client(request(2))
        with pytest.raises(KeyError, match="three"):
            await client(request(3))


async def test_a_pickled_client_asks_by_itself() -> None:
    async with (
        InferenceServer(double, ThreadingTransport()) as server,
        reached(create_app(server)) as url,
        await connected(url) as remote,
    ):
        async with pickle.loads(pickle.dumps(remote.async_client())) as client:
            assert is_double(await client(request(1)), 1)
        with pickle.loads(pickle.dumps(remote)) as other:
            assert is_double(await other.async_client()(request(2)), 2)


# -- connecting, and losing the connection ---------------------------------------------------------------------


class Relay:
    """A way to a server that can be cut, or come to a halt."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._writers: list[asyncio.StreamWriter] = []
        self._flows = asyncio.Event()
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, back]
        await asyncio.gather(self._copy(reader, back), self._copy(onward, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                await self._flows.wait()
                writer.write(data)
        writer.close()

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()

    def halt(self) -> None:
        """Let nothing pass."""
        self._flows.clear()

    @asynccontextmanager
    async def open(self, port: int = 0) -> AsyncIterator[str]:
        """Take connections inside an ``async with`` block."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        try:
            yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            self._flows.set()
            server.close()
            self.cut()


async def fails(kind: type[Exception], client: AsyncInferenceClient) -> None:
    """Ask until a request fails with an error of this kind."""
    with pytest.raises(kind):
        await _always(client)


async def _always(client: AsyncInferenceClient) -> None:
    async with asyncio.timeout(HANG):
        while True:
            await client(request(2))


async def test_requests_under_way_fail_when_the_connection_is_lost_and_later_ones_are_answered(port: int) -> None:
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport()) as server, reached(create_app(server)) as url:
        relay = Relay(url)
        async with relay.open(port) as way:
            remote = await connected(way)
            client, blocking = remote.async_client(), remote.client()
            calls = [client.submit(request(0)), asyncio.to_thread(blocking, request(0))]
            waiting = [asyncio.ensure_future(call) for call in calls]
            await until(lambda: sum(map(len, model.batches)) + server.stats().pending == 2)
            relay.cut()
            for call in waiting:
                with pytest.raises(PeerDiedError):
                    await call
            model.open()
            assert is_double(await client(request(1)), 1)  # it connects anew
        await fails(PeerDiedError, client)
        await fails(PeerDiedError, client)
        async with relay.open(port):
            assert is_double(await client(request(3)), 3)
            assert is_double(await asyncio.to_thread(blocking, request(4)), 4)
            remote.close()
            with pytest.raises(ClientClosedError):
                await client(request(5))


async def test_a_server_that_has_shut_down_is_told_from_one_that_died(port: int) -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        app = create_app(server)
        async with reached(app, port=port) as url:
            remote = await connected(url)
            client = remote.async_client()
            assert is_double(await client(request(1)), 1)
            await app.drain()
            await fails(ServerClosedError, client)
        await fails(ServerClosedError, client)
        async with reached(create_app(server), port=port):
            assert is_double(await client(request(3)), 3)
            remote.close()


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock another thread can put forward."""

    leapt = 0.0  # seconds

    def time(self) -> float:
        return super().time() + self.leapt

    def leap(self, seconds: float) -> None:
        """Put the clock forward."""
        self.leapt += seconds
        self.call_soon_threadsafe(bool)  # it wakes up, and looks at the clock


async def test_a_network_that_is_dead_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With intervals so short that a test can wait for them, one that is slow would seem dead."""
    model, loop = GatedModel(), LeapingLoop()
    async with InferenceServer(model, ThreadingTransport()) as server, reached(create_app(server)) as url:
        relay = Relay(url)
        monkeypatch.setattr(asyncio, "new_event_loop", lambda: loop)
        async with relay.open() as way, await connected(way) as remote:
            reply = remote.async_client().submit(request(1))
            await until(model.entered.is_set)
            relay.halt()
            async with asyncio.timeout(HANG):
                while not reply.done():
                    loop.leap(PING_INTERVAL)
                    await asyncio.sleep(0.001)
            with pytest.raises(PeerDiedError, match="no sign of life"):
                await reply
            model.open()


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("", {"token": "wrong"}, AccessDeniedError, "HTTP 401: this server needs a token"),
        ("", {}, AccessDeniedError, "HTTP 401"),
        ("/nowhere", {"token": "right"}, ServerClosedError, "no inference server"),
    ],
)
async def test_a_server_that_does_not_take_the_caller_says_why(
    path: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        app = create_app(server, tokens=["right"])
        async with reached(app) as url:
            with pytest.raises(error, match=message):
                await connected(url + path, **options)
            async with await connected(url, token="right") as remote:
                assert is_double(await remote.async_client()(request(1)), 1)
            await app.drain()
            with pytest.raises(ServerClosedError, match="HTTP 503"):
                await connected(url, token="right")


async def test_an_app_below_a_prefix_is_found() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        outer = Starlette(routes=[Mount("/policies/one", create_app(server))])
        async with reached(outer) as url, await connected(f"{url}/policies/one") as remote:
            assert is_double(await remote.async_client()(request(1)), 1)


def test_where_no_server_is_none_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimeoutError, match="does not answer within"):
            connect(f"ws://127.0.0.1:{port}", timeout=0.05)
    with reserved_port() as port, pytest.raises(ServerClosedError, match="no server can be reached"):
        connect(f"ws://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["http://localhost:1", "ws://", "tcp://x"])
def test_another_kind_of_url_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="ws://"):
        connect(address)
    with pytest.raises(ValueError, match="needs a URL"):
        connect("/some/path", token="t")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("aioinfer.transports.network")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("aioinfer.transports.network", raising=False)
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ImportError, match=r"pip install 'aioinfer\[serve\]'"):
        connect("ws://127.0.0.1:1")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: of a process that has threads
def test_a_forked_child_connects_anew() -> None:
    with InferenceServer(double, ThreadingTransport()) as server, networked(server) as url, connect(url) as remote:
        client = remote.client()
        assert is_double(client(request(1), HANG), 1)
        with Child("fork", use, client) as child:
            for value in range(5):
                assert child.tell(value) == 2 * value
                assert is_double(client(request(value), HANG), value)
            child.kill()
        assert is_double(client(request(2), HANG), 2)
