"""Callers that fail, stall, vanish or flood, and a server that ends in the middle: everybody else is served."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from websockets.exceptions import ConnectionClosed, InvalidStatus

from aioinfer import AsyncInferenceClient, InferenceServer, ThreadingTransport, connect
from aioinfer.testing import GatedModel, request
from aioinfer.transports.network.messages import decode_header, encode_message, group_payloads
from aioinfer.web import App, create_app
from aioinfer.web.limits import Limits
from tests.limits import HANG
from tests.web.hosting import hosted
from tests.web.listening import listening
from tests.web.robots import HORIZON, act, observation, pack, robot, served, until

HEADERS = [(b"host", b"localhost")]


# -- every call, cancelled wherever it may be ------------------------------------------------------------------


class Answers(AsyncInferenceClient):
    """A client that answers after a few turns of the event loop, or never, and notes what it was asked."""

    def __init__(self, turns: int | None = 3) -> None:
        self.turns = turns
        self.futures: list[asyncio.Future[TensorDictBase]] = []

    def submit(self, td: Any = None, **entries: Any) -> asyncio.Future[TensorDictBase]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[TensorDictBase] = loop.create_future()
        self.futures.append(future)
        reply = TensorDict({"actions": torch.ones(3)})

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
            elif not future.done():
                future.set_result(reply)

        if self.turns is not None:
            turn(self.turns)
        return future

    async def __call__(self, td: Any = None, timeout: Any = None, *, wait: bool = False, **entries: Any) -> Any:  # noqa: ASYNC109
        return await self.submit(td, **entries)


class Peer:
    """The other end of an ASGI call: what it says, and what it is told.

    Args:
        says: messages, each said in a turn of its own.
        replies: how many messages it waits for before it says the last one.
    """

    def __init__(self, says: Sequence[Any], replies: int = 0) -> None:
        self._says = deque(says)
        self._replies = replies
        self._told_more = asyncio.Event()
        self.told: list[Any] = []

    @property
    def is_closed(self) -> bool:
        """Whether the app has closed the connection, or answered the request."""
        return bool(self.told) and self.told[-1]["type"] in ("websocket.close", "http.response.body")

    async def receive(self) -> Any:
        await asyncio.sleep(0)
        while not self.is_closed and (not self._says or (len(self._says) == 1 and len(self.told) < self._replies)):
            self._told_more.clear()
            await self._told_more.wait()
        if self.is_closed:
            return {"type": "websocket.disconnect", "code": 1001}
        return self._says.popleft()

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)
        if self.is_closed:
            raise RuntimeError(f"{message} after the end")  # as uvicorn does
        self.told.append(message)
        self._told_more.set()


def http(method: str, path: str, body: bytes = b"") -> tuple[dict[str, Any], Callable[[], Peer]]:
    """A request whose body comes in two parts."""
    scope = {"type": "http", "method": method, "path": path, "headers": HEADERS, "query_string": b"", "root_path": ""}
    middle = len(body) // 2
    says = [
        {"type": "http.request", "body": body[:middle], "more_body": True},
        {"type": "http.request", "body": body[middle:]},
    ]
    return scope, lambda: Peer(says)


def websocket(path: str, *messages: bytes, replies: int) -> tuple[dict[str, Any], Callable[[], Peer]]:
    """A connection that ends after so many messages of the server, the handshake among them."""
    scope = {"type": "websocket", "path": path, "headers": HEADERS, "query_string": b"", "root_path": ""}
    says = [
        {"type": "websocket.connect"},
        *[{"type": "websocket.receive", "bytes": message} for message in messages],
        {"type": "websocket.disconnect", "code": 1000},
    ]
    return scope, lambda: Peer(says, replies)


def asks(*numbers: int) -> bytes:
    """A message of our own stream with several requests."""
    about = {"callers": [0] * len(numbers), "mode": "inherit", "wait": False, "deadline": None}
    groups = group_payloads([request(number) for number in numbers])
    header = {"cancelled": [], "refused": 0}
    return encode_message(
        header, [({**about, "numbers": [numbers[index] for index in group.indices]}, group) for group in groups]
    )


ACT = json.dumps({"observation": [1.0, 1.0, 1.0]}).encode()
OIP = json.dumps(
    {"inputs": [{"name": "observation", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 1.0, 1.0]}]}
).encode()
OBSERVATION = pack({"observation": [1.0, 1.0, 1.0]})
CALLS = {
    "act": http("POST", "/act", ACT),
    "act-rubbish": http("POST", "/act", b"{rubbish"),
    "oip": http("POST", "/v2/models/policy/infer", OIP),
    "ready": http("GET", "/readyz"),
    "metrics": http("GET", "/metrics"),
    "stats": http("GET", "/stats"),
    "page": http("GET", "/"),
    "robot": websocket("/", OBSERVATION, b"rubbish", OBSERVATION, replies=5),
    "robot-gone": websocket("/", OBSERVATION, OBSERVATION, OBSERVATION, replies=2),
    "robot-gone-at-once": websocket("/", replies=0),
    "stream": websocket("/v1/stream", asks(1, 2), asks(3), replies=4),
    "stream-gone": websocket("/v1/stream", asks(1, 2), asks(3), replies=2),
}


@asynccontextmanager
async def nothing_is_left() -> AsyncIterator[None]:
    """Check that a block leaves no task behind, and no exception of which nobody was told."""
    loop = asyncio.get_running_loop()
    troubles: list[Any] = []
    loop.set_exception_handler(lambda _, trouble: troubles.append(trouble))
    before = asyncio.all_tasks()
    yield
    await until(lambda: not asyncio.all_tasks() - before)
    gc.collect()
    assert not troubles, troubles


def is_idle(app: App) -> bool:
    front = app.front
    return front.bytes_in_flight.bytes == 0 and front.stats.inflight == 0 and not any(front.stats.connections.values())


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def cancelled_after(call: Coroutine[Any, Any, Any], count: int) -> bool:
    """Run a call, and cancel it after so many turns of the event loop; whether it had not ended by then."""
    task = asyncio.create_task(call)
    await turns(count)
    cancelled = task.cancel()
    try:
        async with asyncio.timeout(HANG):
            await task
    except asyncio.CancelledError:
        pass
    return cancelled


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("only_new_garbage")
async def test_a_call_that_is_cancelled_anywhere_leaves_nothing_behind(name: str) -> None:
    scope, peer = CALLS[name]
    app = create_app(client := Answers())
    async with nothing_is_left():
        count = 0
        while await cancelled_after(app(dict(scope), (end := peer()).receive, end.send), count):
            await turns(5)
            assert is_idle(app), count
            assert all(future.done() for future in client.futures), count
            count += 1
        app.close()
    assert end.told
    assert await app.drain()


# -- the end, at any moment ------------------------------------------------------------------------------------

STAYS = 1000  # messages, for which a peer waits that does not go by itself


def endings() -> dict[str, Peer]:
    """Callers of every kind that stay until the app ends, each with requests under way."""
    return {
        "act": http("POST", "/act", ACT)[1](),
        "oip": http("POST", "/v2/models/policy/infer", OIP)[1](),
        "robot": websocket("/", OBSERVATION, OBSERVATION, replies=STAYS)[1](),
        "idle": websocket("/", replies=STAYS)[1](),
        "stream": websocket("/v1/stream", asks(1, 2), asks(3), replies=STAYS)[1](),
    }


def call(app: App, peers: Mapping[str, Peer]) -> list[asyncio.Task[None]]:
    """Let peers call the app."""
    scopes = {**{name: scope for name, (scope, _) in CALLS.items()}, "idle": CALLS["robot"][0]}
    return [asyncio.create_task(app(dict(scopes[name]), one.receive, one.send)) for name, one in peers.items()]


async def drained_after(app: App, count: int, timeouts: Sequence[float | None]) -> tuple[dict[str, Peer], list[bool]]:
    """Let callers of every kind ask, and drain the app after so many turns; what they were told, and the outcomes."""
    peers = endings()
    calls = call(app, peers)
    await turns(count)
    async with asyncio.timeout(HANG):
        outcomes = await asyncio.gather(*[app.drain(timeout) for timeout in timeouts])
        if not all(outcomes):  # the callers are told that nobody waits for
            for task, name in zip(calls, peers, strict=True):
                if name in ("act", "oip"):
                    task.cancel()
        await asyncio.wait(calls)
    app.close()
    assert is_idle(app), count
    return peers, outcomes


def end_of(peer: Peer) -> int:
    """The status of a reply, or of a refused handshake, or the code that closed a connection."""
    statuses = [message["status"] for message in peer.told if "status" in message]
    return int(statuses[0] if statuses else peer.told[-1]["code"])


@pytest.mark.parametrize("timeouts", [[None], [HANG, None]], ids=["once", "twice"])
@pytest.mark.usefixtures("only_new_garbage")
async def test_a_drain_at_any_moment_answers_what_was_asked(timeouts: Sequence[float | None]) -> None:
    async with nothing_is_left():
        for count in range(25):
            app = create_app(client := Answers())
            peers, outcomes = await drained_after(app, count, timeouts)
            assert all(outcomes), count
            assert end_of(peers["act"]) in (200, 503), count
            assert end_of(peers["oip"]) in (200, 503), count
            assert {end_of(peers[name]) for name in ("robot", "idle", "stream")} <= {1001, 503}, count
            assert not any(future.cancelled() for future in client.futures), count
            assert sum([len(answers_in(peer)) for peer in peers.values()]) == len(client.futures), count


def answers_in(peer: Peer) -> list[int]:
    """An element for each request that was answered with a reply."""
    if "status" in peer.told[0]:
        return [1] * (peer.told[0]["status"] == 200)
    found: list[int] = []
    for message in peer.told:
        data = message.get("bytes") or b""
        if b"actions" in data:
            found += [1] * (len(decode_header(data)[1][0]["numbers"]) if b"numbers" in data else 1)
    return found


@pytest.mark.usefixtures("only_new_garbage")
async def test_a_drain_without_time_ends_connections_at_any_moment() -> None:
    async with nothing_is_left():
        for count in range(25):
            app = create_app(client := Answers(turns=None))
            peers, _ = await drained_after(app, count, [0.0, 0.0])
            assert {end_of(peers[name]) for name in ("robot", "idle", "stream")} <= {1001, 503}, count
            assert all(future.cancelled() for future in client.futures), count


@pytest.mark.usefixtures("only_new_garbage")
async def test_a_drain_that_is_cancelled_anywhere_can_be_done_again() -> None:
    async with nothing_is_left():
        count, cancelled = 0, True
        while cancelled:
            app = create_app(Answers())
            peers = endings()
            calls = call(app, peers)
            await turns(2)
            cancelled = await cancelled_after(app.drain(), count)
            assert await app.drain()
            async with asyncio.timeout(HANG):
                await asyncio.gather(*calls)
            assert all(peer.is_closed for peer in peers.values()), count
            app.close()
            count += 1


async def test_who_asks_while_the_app_is_drained_is_told(model: GatedModel) -> None:
    async with busy(model) as (app, url, http), robot(url) as waiting, robot(url) as idle:
        await waiting.send(observation(1))
        await until(lambda: app.front.stats.inflight == 2)
        draining = asyncio.create_task(app.drain())
        with pytest.raises(ConnectionClosed) as closed:
            await idle.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        refused = await http.post("/act", json={"state": [9.0] * 8})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]
        with pytest.raises(InvalidStatus) as rejected:
            async with robot(url):
                pass
        assert rejected.value.response.status_code == 503
        await waiting.send(observation(9))
        assert not draining.done()
        model.open()
        waiting.check(await waiting.receive(), 1)
        with pytest.raises(ConnectionClosed) as closed:
            await waiting.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert await draining
    assert 9 not in model.seen


# -- callers share a server ------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Iterator[GatedModel]:
    gated = GatedModel(act, key="state")
    yield gated
    gated.open()


@asynccontextmanager
async def busy(
    model: GatedModel, limits: Limits | None = None, **options: Any
) -> AsyncIterator[tuple[App, str, httpx.AsyncClient]]:
    """Serve a model that is in a pass over a first request."""
    server = InferenceServer(model, ThreadingTransport(), **options)
    app = create_app(server, limits=limits)
    async with hosted(app) as url, httpx.AsyncClient(base_url=url, timeout=HANG) as http, robot(url) as first:
        await first.send(observation(0))
        await until(model.entered.is_set)
        try:
            yield app, url, http
        finally:
            model.open()
        first.check(await first.receive(), 0)


MALFORMED = {
    "shape": {"state": np.zeros(3, np.float32)},
    "nothing": {"state": np.zeros((0, 8), np.float32)},
    "name": {"stat": np.zeros(8, np.float32)},
    "dtype": {"state": np.zeros(8, np.int64)},
    "nested": {"state": {"state": np.zeros(8, np.float32)}},
    "fatal": {"state": np.full(8, -1, np.float32)},
}


def fails_below_zero(td: TensorDictBase) -> TensorDictBase:
    if (td["state"].float() < 0).any() or td["state"].shape[1:] != (8,):
        raise ValueError("no state of this robot")
    return act(td)


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_observation_fails_alone(malformed: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    model = GatedModel(fails_below_zero, key="state")
    async with busy(model) as (app, url, _), AsyncExitStack() as stack:
        robots = [await stack.enter_async_context(robot(url)) for _ in range(8)]
        for value, one in enumerate(robots):
            await one.send(malformed if value == 4 else observation(value))
        good = 8 if malformed is MALFORMED["dtype"] else 7
        await until(lambda: app.front.stats.inflight + sum(app.front.stats.requests.values()) == 9)
        model.open()
        for value, one in enumerate(robots):
            reply = await one.receive()
            if value == 4:
                assert isinstance(reply, str) or good == 8
            else:
                one.check(reply, value)
        for value, one in enumerate(robots):
            await one.act(value)
    assert {0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0} <= set(model.batches[1]), "they did not share a batch"


async def test_a_newer_request_that_is_refused_ends_no_older_one(model: GatedModel) -> None:
    server = InferenceServer(model, ThreadingTransport(), max_pending=1)
    app = create_app(server, newest_wins=True)
    async with hosted(app) as url, robot(url) as one, robot(url) as other:
        await one.send(observation(0))
        await until(model.entered.is_set)
        await other.send(observation(1))
        await until(lambda: app.front.stats.inflight == 2)
        await other.send(observation(2))
        await until(lambda: app.front.stats.requests["openpi", "rejected"] == 1)
        model.open()
        one.check(await one.receive(), 0)
        other.check(await other.receive(), 1)
        assert "queue is full" in await other.receive()


async def by_robot(url: str, values: Iterable[int]) -> None:
    async with robot(url) as one:
        for value in values:
            await one.act(value)


async def by_act(url: str, values: Iterable[int]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=HANG) as client:
        for value in values:
            reply = await client.post("/act", json={"state": [float(value)] * 8})
            assert reply.json()["actions"][0][0] == 2.0 * value


async def by_open_inference(url: str, values: Iterable[int]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=HANG) as client:
        for value in values:
            tensor = {"name": "state", "shape": [1, 8], "datatype": "FP32", "data": [float(value)] * 8}
            reply = await client.post("/v2/models/policy/infer", json={"id": str(value), "inputs": [tensor]})
            (actions,) = [one for one in reply.json()["outputs"] if one["name"] == "actions"]
            assert reply.json()["id"] == str(value)
            assert set(actions["data"]) == {2.0 * value}


async def by_binary_open_inference(url: str, values: Iterable[int]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=HANG) as client:
        for value in values:
            state = np.full((1, 8), value, np.float32).tobytes()
            tensor = {"name": "state", "shape": [1, 8], "datatype": "FP32"}
            message = {
                "inputs": [{**tensor, "parameters": {"binary_data_size": len(state)}}],
                "outputs": [{"name": "actions", "parameters": {"binary_data": True}}],
            }
            head = json.dumps(message).encode()
            headers = {"inference-header-content-length": str(len(head))}
            reply = await client.post("/v2/models/policy/infer", content=head + state, headers=headers)
            actions = np.frombuffer(reply.content[int(reply.headers["inference-header-content-length"]) :], np.float32)
            assert set(actions.tolist()) == {2.0 * value}


async def by_stream(client: AsyncInferenceClient, values: Iterable[int]) -> None:
    for value in values:
        reply = await client(state=np.full(8, value, np.float32))
        assert (reply["actions"] == 2 * value).all()


@asynccontextmanager
async def served_whole() -> AsyncIterator[tuple[App, str]]:
    """Serve as the command does: what comes whole over HTTP goes past ASGI."""
    async with InferenceServer(act, ThreadingTransport()) as server:
        app = create_app(server)
        async with listening(app, whole=lambda: app) as at:
            yield app, f"http://127.0.0.1:{at.port}"
        app.close()


@pytest.mark.parametrize("serving", [served, served_whole])
@pytest.mark.parametrize("count", [512, pytest.param(10_000, marks=pytest.mark.stress)])
async def test_nobody_gets_the_actions_of_another(serving: Any, count: int) -> None:
    async with serving() as (_, url):
        remote = await asyncio.to_thread(connect, url.replace("http", "ws"))
        async with remote:
            numbers = [range(first, count, 64) for first in range(64)]
            callers = [
                *[by_robot(url, values) for values in numbers[:16]],
                *[by_act(url, values) for values in numbers[16:32]],
                *[by_open_inference(url, values) for values in numbers[32:40]],
                *[by_binary_open_inference(url, values) for values in numbers[40:48]],
                *[by_stream(remote.async_client(), values) for values in numbers[48:]],
            ]
            await asyncio.gather(*callers)


CLIENT = """
import http.client, json, sys, time
from websockets.sync.client import connect

port = int(sys.argv[1])
robot = connect(f"ws://127.0.0.1:{port}/", legacy=True, open_timeout=None)
stream = connect(f"ws://127.0.0.1:{port}/v1/stream", legacy=True, open_timeout=None)
robot.recv(), stream.recv()
robot.send(bytes.fromhex(sys.argv[2]))
stream.send(bytes.fromhex(sys.argv[3]))
plain = http.client.HTTPConnection("127.0.0.1", port)
plain.request("POST", "/act", json.dumps({"state": [11.0] * 8}))
time.sleep(1000)
"""


async def test_the_requests_of_a_client_that_is_killed_are_not_computed(model: GatedModel) -> None:
    about = {"numbers": [1], "callers": [0], "mode": "inherit", "wait": False, "deadline": None}
    (group,) = group_payloads([observation(12)])
    asked = encode_message({"cancelled": [], "refused": 0}, [(about, group)])
    async with busy(model) as (app, url, _), robot(url) as other:
        port = url.rpartition(":")[2]
        arguments = [port, pack(observation(10)).hex(), asked.hex()]
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, *arguments)
        server = app.front.backend.server
        assert isinstance(server, InferenceServer)
        try:
            await until(lambda: server.stats().pending == 3 or process.returncode is not None)
        finally:
            process.kill()
            await process.wait()
        await until(lambda: sum(app.front.stats.requests.values()) == 3)
        await other.send(observation(1))
        await until(lambda: server.stats().pending == 1)
        model.open()
        other.check(await other.receive(), 1)
    assert model.seen == {0, 1}


async def test_a_caller_that_does_not_read_is_closed_and_holds_nobody_up() -> None:
    asked: list[float] = []
    width = 2**13  # of 320 KiB

    def model(td: TensorDictBase) -> TensorDictBase:
        asked.extend(td["state"][:, 0].tolist())
        return TensorDict({"actions": td["state"][:, :1, None].expand(-1, HORIZON, width).contiguous()}, td.batch_size)

    limits = Limits(stall_timeout=0.5, max_pending_per_connection=8)
    async with (
        served(model, limits=limits) as (app, url),
        robot(url) as good,
        robot(url, ping_interval=None) as stalled,
    ):
        stalled.socket.transport.pause_reading()
        for value in range(1, 101):
            await stalled.send(observation(-value))
        async with asyncio.timeout(HANG):
            while app.front.stats.connections["openpi"] > 1:
                reply = await good.ask(observation(1))
                assert (reply["actions"] == 1).all()
        assert app.front.bytes_in_flight.bytes == 0
        stalled.socket.transport.abort()
    # What the system and uvicorn hold, and what may be pending: nothing more was computed for it.
    assert 8 <= len([value for value in asked if value < 0]) < 60


async def test_the_event_loop_never_waits_for_the_model(model: GatedModel) -> None:
    """However long a pass takes: this one ends when the test has seen everything else."""
    async with busy(model, max_pending=2) as (app, url, http), AsyncExitStack() as stack:
        robots = [await stack.enter_async_context(robot(url)) for _ in range(4)]
        for value, one in enumerate(robots[:2], 1):
            await one.send(observation(value))
        await until(lambda: app.front.stats.inflight == 3)
        for value, one in enumerate(robots[2:], 3):
            assert "queue is full" in await one.ask(observation(value))
        refused = await http.post("/act", json={"state": [9.0] * 8})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        for one in robots:
            await (await one.socket.ping())
        for path in ("/livez", "/readyz", "/metrics", "/stats", "/", "/v2/health/live"):
            assert (await http.get(path)).status_code == 200, path
        model.open()
        for value, one in enumerate(robots[:2], 1):
            one.check(await one.receive(), value)
        for value, one in enumerate(robots):
            await one.act(value)
    assert 9 not in model.seen
