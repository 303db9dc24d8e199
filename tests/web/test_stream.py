"""The protocol of ``connect("ws://...")``, message by message."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from websockets.exceptions import ConnectionClosed

from aioinfer import (
    InferenceServer,
    InvalidRequestError,
    ModelError,
    MPTransport,
    ServerClosedError,
    ServerOverloadedError,
    ThreadingTransport,
    connect,
)
from aioinfer.errors import DeadlineExceededError
from aioinfer.interaction_type import interaction_type
from aioinfer.testing import GatedModel, double
from aioinfer.testing.callers import is_double
from aioinfer.transports.network.messages import Group, encode_message
from aioinfer.web import App, Limits, create_app
from tests.limits import HANG
from tests.web.hosting import hosted
from tests.web.robots import until
from tests.web.streams import Stream, ask_message, streaming
from tests.web.test_network_messages import MALFORMED, VALUES, message_of

SAID = {"mode": "inherit", "wait": False, "deadline": None}
NOTHING = Group([], False, [], [], [], [], None)


class Service:
    """A server, its app, and where it is."""

    def __init__(self, server: InferenceServer, app: App, url: str) -> None:
        self.server = server
        self.app = app
        self.url = url

    def outcomes(self) -> dict[str, int]:
        """How many requests ended how."""
        counts = self.app.front.stats.requests
        return {outcome: count for (protocol, outcome), count in counts.items() if protocol == "stream" and count}


@asynccontextmanager
async def serving(model: Any = double, *, limits: Limits | None = None, **options: Any) -> AsyncIterator[Service]:
    """Serve a model, inside an ``async with`` block, at the end of which nothing is in flight."""
    web = {key: options.pop(key) for key in ("deadline", "debug", "name") if key in options}
    async with InferenceServer(model, ThreadingTransport(), **options) as server:
        app = create_app(server, limits=limits, **web)
        async with hosted(app, lifespan="off") as url:
            try:
                yield Service(server, app, url)
            finally:
                if isinstance(model, GatedModel):
                    model.open()
        assert app.front.bytes_in_flight.bytes == 0


async def entered(model: GatedModel) -> None:
    assert await asyncio.to_thread(model.entered.wait, HANG)


async def test_the_server_says_who_it_is_and_answers_many_requests_in_one_message() -> None:
    async with serving(name="mine") as service, streaming(service.url) as stream:
        assert stream.hello == {"protocol": 1, "policy": "mine", "max_message_size": 64 << 20, "max_pending": 1024}
        await stream.socket.send(ask_message(range(64), first=100))
        for value in range(64):
            assert is_double(await stream.outcome(100 + value), value)
        assert stream.messages == 1
        assert service.server.stats().mean_batch_size == 64
        await until(lambda: service.outcomes() == {"ok": 64})
        assert service.app.front.stats.connections["stream"] == 1


async def test_replies_come_as_they_are_there() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        gate(td) if (td["observation"] < 0).any() else None
        return double(td)

    gate = GatedModel()
    async with serving(model, max_batch_size=1) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([1, 2, -3, 4]))
        assert is_double(await stream.outcome(1), 2)
        assert not {2, 3} & stream.outcomes.keys()
        gate.open()
        assert is_double(await stream.outcome(3), 4)


async def test_cancelled_requests_are_neither_computed_nor_answered() -> None:
    model = GatedModel()
    async with serving(model) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([0]))
        await entered(model)
        await stream.socket.send(ask_message([1, 2, 3], first=1))
        await until(lambda: service.server.stats().pending == 3)
        await stream.socket.send(ask_message([], cancelled=[0, 1, 3, 99]))
        await until(lambda: service.server.stats().pending == 1)
        model.open()
        assert is_double(await stream.outcome(2), 2)
        assert stream.outcomes.keys() == {2}
        assert service.outcomes() == {"ok": 1, "cancelled": 3}
    assert model.seen == {0, 2}


async def test_requests_of_a_connection_that_is_closed_are_not_computed() -> None:
    model = GatedModel()
    async with serving(model) as service, streaming(service.url) as stream:
        async with streaming(service.url) as other:
            await stream.socket.send(ask_message([0]))
            await entered(model)
            await other.socket.send(ask_message([1, 2]))
            await until(lambda: service.server.stats().pending == 2)
            other.socket.transport.abort()
        await until(lambda: service.server.stats().pending == 0)
        await stream.socket.send(ask_message([3], first=1))
        model.open()
        assert is_double(await stream.outcome(1), 3)
        assert service.app.front.stats.connections["stream"] == 1
    assert model.seen == {0, 3}


@pytest.mark.parametrize("of_app", [False, True])
async def test_a_deadline_counts_from_the_receipt(of_app: bool) -> None:
    model = GatedModel()
    async with serving(model, deadline=0.02 if of_app else None) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([0], deadline=HANG))
        await entered(model)
        await stream.socket.send(ask_message([1, 2], first=1, deadline=None if of_app else 0.02))
        assert isinstance(await stream.outcome(1), DeadlineExceededError)
        assert isinstance(await stream.outcome(2), DeadlineExceededError)
        model.open()
        assert is_double(await stream.outcome(0), 0)
        await until(lambda: service.outcomes() == {"ok": 1, "expired": 2})
    assert model.seen == {0}


async def test_what_waits_and_can_not_be_answered_in_time_is_not_computed() -> None:
    model = GatedModel()
    async with serving(model) as service, streaming(service.url) as stream:
        service.server.transport.queue.pass_seconds.append(HANG)  # type: ignore[attr-defined]
        await stream.socket.send(ask_message([0], deadline=10 * HANG))
        await entered(model)
        await stream.socket.send(ask_message([1, 2], first=1, deadline=0.1))
        await stream.socket.send(ask_message([3], first=3, deadline=10 * HANG))
        for number in (1, 2):
            assert isinstance(await stream.outcome(number), DeadlineExceededError)
        model.open()
        assert is_double(await stream.outcome(0), 0)
        assert is_double(await stream.outcome(3), 3)
    assert model.seen == {0, 3}


async def test_a_client_that_asks_far_more_than_it_may_is_closed() -> None:
    async with serving(limits=Limits(max_pending_per_connection=4)) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message(range(9)))
        with pytest.raises(ConnectionClosed) as closed:
            await stream.outcome(99)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


async def test_a_message_of_far_more_requests_than_may_be_is_not_looked_into() -> None:
    async with serving() as service, streaming(service.url) as stream:
        message = encode_message({}, [({"numbers": list(range(10**5)), **SAID, "callers": [0] * 10**5}, NOTHING)])
        await stream.socket.send(message + bytes(10**5))
        with pytest.raises(ConnectionClosed) as closed:
            await stream.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


async def test_requests_that_clients_have_refused_are_counted() -> None:
    async with serving() as service, streaming(service.url) as stream:
        for _ in range(4):
            await stream.socket.send(encode_message({"refused": 2**20}))
        await stream.socket.send(ask_message([1]))
        assert is_double(await stream.outcome(0), 1)
        assert service.server.stats().rejected == 4 * 2**20
        assert service.outcomes()["invalid"] == 4 * 2**20


async def test_requests_wait_for_space_where_they_say_so() -> None:
    model = GatedModel()
    async with serving(model, max_pending=1, max_batch_size=1) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([0]))
        await entered(model)
        await stream.socket.send(ask_message([1, 2], first=1))
        assert isinstance(await stream.outcome(2), ServerOverloadedError)
        await stream.socket.send(ask_message([3, 4], first=3, wait=True))
        model.open()
        for number in (0, 1, 3, 4):
            assert is_double(await stream.outcome(number), number)
        await until(lambda: service.outcomes() == {"ok": 4, "rejected": 1})


async def test_more_requests_than_a_connection_may_have_are_refused() -> None:
    model = GatedModel()
    limits = Limits(max_pending_per_connection=2)
    async with serving(model, limits=limits) as service, streaming(service.url) as stream:
        assert stream.hello["max_pending"] == 2
        await stream.socket.send(ask_message([0, 1]))
        await entered(model)
        await stream.socket.send(ask_message([2], first=2))
        assert isinstance(await stream.outcome(2), ServerOverloadedError)
        model.open()
        assert is_double(await stream.outcome(1), 1)
        await stream.socket.send(ask_message([3], first=3))
        assert is_double(await stream.outcome(3), 3)


async def test_bytes_in_flight_are_counted_and_bounded() -> None:
    model = GatedModel()
    message = ask_message([0], size=1000)
    async with (
        serving(model, limits=Limits(max_bytes_in_flight=2 * len(message))) as service,
        streaming(service.url) as stream,
        streaming(service.url) as other,
    ):
        await stream.socket.send(message)
        await entered(model)
        assert service.app.front.bytes_in_flight.bytes == len(message)
        await other.socket.send(message)
        await other.socket.send(ask_message([1], first=1, size=1000))
        assert isinstance(await other.outcome(1), ServerOverloadedError)
        model.open()
        assert is_double(await stream.outcome(0), 0)
        assert is_double(await other.outcome(0), 0)
        await until(lambda: service.app.front.bytes_in_flight.bytes == 0)


async def test_a_drain_answers_what_was_asked_and_then_closes() -> None:
    model = GatedModel()
    async with serving(model) as service, streaming(service.url) as stream, streaming(service.url) as idle:
        await stream.socket.send(ask_message([0]))
        await entered(model)
        await stream.socket.send(ask_message([1], first=1))
        await until(lambda: service.server.stats().pending == 1)
        draining = asyncio.create_task(service.app.drain())
        with pytest.raises(ConnectionClosed) as closed:
            await idle.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        await stream.socket.send(ask_message([2], first=2))
        assert isinstance(await stream.outcome(2), ServerClosedError)
        model.open()
        assert is_double(await stream.outcome(1), 1)
        assert await draining
        with pytest.raises(ConnectionClosed):
            await stream.receive()


async def test_a_caller_that_does_not_read_is_hung_up_on_and_delays_nobody() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"action": td["observation"] * 2, "large": torch.zeros(len(td), 2**20)}, [len(td)])

    async with (
        serving(model, limits=Limits(stall_timeout=0.1)) as service,
        streaming(service.url) as good,
        streaming(service.url) as deaf,
    ):
        deaf.socket.transport.pause_reading()
        for number in range(20):
            await deaf.socket.send(ask_message([number], first=number))
        await until(lambda: service.app.front.stats.connections["stream"] == 1)
        await good.socket.send(ask_message([5]))
        assert is_double(await good.outcome(0), 5)
        deaf.socket.transport.abort()


# -- errors ----------------------------------------------------------------------------------------------------


async def test_a_request_fails_alone() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            raise ValueError("negative")
        return double(td)

    async with serving(model) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([1, -2, 3]))
        error = await stream.outcome(1)
        assert type(error) is ValueError
        assert str(error) == "negative"
        assert error.__notes__[0].startswith("error id ")
        assert is_double(await stream.outcome(0), 1)
        assert is_double(await stream.outcome(2), 3)
        await until(lambda: service.outcomes() == {"ok": 2, "error": 1})


async def test_a_traceback_is_told_where_the_app_is_debugged() -> None:
    def model(_: TensorDictBase) -> TensorDictBase:
        raise LookupError("here")

    async with serving(model, debug=True) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([1]))
        assert "Traceback" in (await stream.outcome(0)).__notes__[0]


async def test_a_reply_that_does_not_travel_fails_alone() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        dtype = torch.complex64 if (td["observation"] < 0).any() else torch.float32
        return TensorDict({"action": (td["observation"] * 2).to(dtype)}, [len(td)])

    async with serving(model, max_batch_size=1) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([1, -2, 3]))
        assert is_double(await stream.outcome(0), 1)
        assert is_double(await stream.outcome(2), 3)
        error = await stream.outcome(1)
        assert type(error) is ModelError
        assert "does not travel" in str(error)


# -- servers that are asked by clients -------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["client", "remote server"])
async def test_a_server_of_another_process_is_asked_by_its_clients(made: str) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        mode = interaction_type()
        td = gate(td)
        return td.set("mode", torch.full(td.batch_size, 0 if mode is None else len(mode.value)))

    gate = GatedModel()
    async with InferenceServer(model, MPTransport(), max_pending=1, max_batch_size=1) as server:
        remote = await asyncio.to_thread(connect, server.address)
        async with remote:
            app = create_app(remote.async_client() if made == "client" else remote)
            async with hosted(app, lifespan="off") as url, streaming(url) as stream:
                await stream.socket.send(ask_message([0], mode="mean"))
                await entered(gate)
                await stream.socket.send(ask_message([1], first=1))
                await until(lambda: server.stats().pending == 1)
                await stream.socket.send(ask_message([2], first=2))
                assert isinstance(await stream.outcome(2), ServerOverloadedError)
                await stream.socket.send(ask_message([3], first=3, wait=True, mode="random"))
                await stream.socket.send(ask_message([], cancelled=[1]))
                await until(lambda: app.front.stats.requests["stream", "cancelled"] == 1)
                gate.open()
                assert (await stream.outcome(0))["mode"] == 4
                reply = await stream.outcome(3)
                assert is_double(reply, 3)
                assert reply["mode"] == 6
    assert gate.seen == {0, 3}


# -- rubbish ---------------------------------------------------------------------------------------------------


def rubbish_of_headers() -> Iterator[bytes]:
    good = {"numbers": [7], "callers": [0], "mode": "inherit", "wait": False, "deadline": None, "by_name": True}
    good |= {"batch_size": [], "sizes": [], "leaves": [[["observation"], "f4", [3]]], "plain": None}
    changes: list[dict[str, Any]] = [
        {"callers": []},
        {"callers": ["x"]},
        {"mode": "other"},
        {"mode": ["mean"]},
        {"wait": 1},
        {"deadline": "soon"},
        {"deadline": float("nan")},
        {"numbers": [7, 8]},
        {"numbers": [True]},
        {"leaves": [[["observation"], "O", [3]]]},
    ]
    for change in changes:
        yield message_of({"groups": [good | change]}, bytes(16))
    for name in good:
        yield message_of({"groups": [{key: value for key, value in good.items() if key != name}]}, bytes(16))
    for header in ({"cancelled": 3}, {"cancelled": [None]}, {"refused": -1}, {"refused": 2**40}, {"refused": "1"}):
        yield message_of({"groups": [], **header})
    yield message_of({"groups": [good, good]}, bytes(32))
    yield message_of({"groups": [good]}, bytes(24))


async def test_a_malformed_message_costs_nothing_but_itself() -> None:
    async with serving() as service, streaming(service.url) as stream:
        count = 0
        for message in (*MALFORMED, *rubbish_of_headers()):
            await stream.socket.send(message)
            count += 1
            while len(stream.malformed) + len(stream.outcomes) < count:
                await stream.receive()
            for number in list(stream.outcomes):
                assert isinstance(stream.outcomes.pop(number), InvalidRequestError)
                count -= 1
        await stream.socket.send("a text")
        await stream.receive()
        await stream.socket.send(ask_message([4], first=1000))
        assert is_double(await stream.outcome(1000), 4)
        assert service.outcomes()["invalid"] >= len(MALFORMED)


async def test_a_number_that_is_under_way_is_not_used_again() -> None:
    model = GatedModel()
    async with serving(model) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([1]))
        await entered(model)
        await stream.socket.send(ask_message([2]))
        await stream.receive()
        assert stream.malformed
        model.open()
        assert is_double(await stream.outcome(0), 1)


class Unpickled:
    """Says so."""

    found = False

    def __reduce__(self) -> Any:
        return setattr, (Unpickled, "found", True)


async def test_a_pickle_is_not_read() -> None:
    async with serving() as service, streaming(service.url) as stream:
        pickled = pickle.dumps(Unpickled())
        for message in (
            pickled,
            message_of(pickled),
            message_of({"groups": pickled}),
            message_of({"groups": [pickled]}),
        ):
            await stream.socket.send(message)
            await stream.receive()
        assert len(stream.malformed) == 4
    assert not Unpickled.found


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good message with some bytes changed, and perhaps cut short."""
    message = bytearray(GOOD)
    for place in draw(st.lists(st.integers(0, len(message) - 1), min_size=1, max_size=4)):
        message[place] = draw(st.integers(0, 255))
    return bytes(message[: draw(st.integers(0, len(message)))])


GOOD = ask_message([1, 2], first=2**40)
RUBBISH = st.binary(max_size=64) | VALUES.map(lambda value: message_of(value, bytes(16))) | mutated()


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.stress)])
def test_a_good_client_is_answered_after_each_malformed_message(count: int) -> None:
    async def exchange(bad: Stream, good: Stream, message: bytes) -> None:
        numbers.append(len(numbers))
        await bad.socket.send(message)
        await good.socket.send(ask_message([numbers[-1]], first=numbers[-1]))
        assert is_double(await good.outcome(numbers[-1]), numbers[-1])
        good.outcomes.clear()

    async def read(bad: Stream) -> None:
        async for _ in bad.socket:
            pass

    async def start() -> Any:
        service = await stack.enter_async_context(serving())
        bad, good = [await stack.enter_async_context(streaming(service.url)) for _ in range(2)]
        return bad, good, asyncio.create_task(read(bad))

    numbers: list[int] = []
    stack = AsyncExitStack()
    with asyncio.Runner() as runner:
        bad, good, reading = runner.run(start())

        @hypothesis.settings(max_examples=count // 5, database=None)
        @hypothesis.given(st.lists(RUBBISH, min_size=5, max_size=5))
        def try_all(messages: list[bytes]) -> None:
            for message in messages:
                runner.run(exchange(bad, good, message))

        try:
            try_all()
            assert len(numbers) >= count
            assert not reading.done()
        finally:
            runner.run(stack.aclose())
