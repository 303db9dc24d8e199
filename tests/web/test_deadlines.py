from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from starlette.applications import Starlette
from starlette.routing import Mount
from tensordict import TensorDict, TensorDictBase

from aioinfer import (
    AsyncInferenceClient,
    InferenceServer,
    MPTransport,
    NoFreeSlotError,
    ProcessInferenceServer,
    ProcessSlotTransport,
    ServerOverloadedError,
    SlotTransport,
    ThreadingTransport,
    connect,
)
from aioinfer.errors import DeadlineExceededError
from aioinfer.testing import GatedModel, double, request
from aioinfer.testing.callers import is_double, request_of
from aioinfer.web import create_app
from aioinfer.web.backend import Backend, PendingReply
from tests.hosted import forked, make_double
from tests.limits import HANG
from tests.stepped import Steps
from tests.transports import FiveVerbs
from tests.web.hosting import hosted
from tests.web.listening import Clock
from tests.web.robots import until

LOCAL: dict[str, Callable[[], Any]] = {"threading": ThreadingTransport, "slots": lambda: SlotTransport(16)}


def observation(value: float) -> dict[str, Any]:
    return {"observation": np.full(3, value, np.float32)}


@pytest.fixture
def model() -> Iterator[GatedModel]:
    gated = GatedModel()
    yield gated
    gated.open()


@asynccontextmanager
async def busy(model: GatedModel, transport: Any, **options: Any) -> AsyncIterator[tuple[InferenceServer, Any]]:
    """A server whose model is in a pass over ``request(0)``, and the future of its reply."""
    async with InferenceServer(model, transport, **options) as server:
        first = server.async_client().submit(request(0))
        await until(model.entered.is_set)
        try:
            yield server, first
        finally:
            model.open()
            await first


# -- to take a request back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", LOCAL.values(), ids=LOCAL)
async def test_a_request_that_waits_can_be_taken_back_and_is_not_computed(
    model: GatedModel, transport: Callable[[], Any]
) -> None:
    async with busy(model, transport()) as (server, _):
        client, other = server.async_client(), server.async_client()
        future, kept = client.submit(request(1)), other.submit(request(2))
        assert client.withdraw(future)
        assert future.cancelled()
        assert server.stats().pending == 1
        assert server.stats().cancelled == 1
        assert not client.withdraw(future)
        again = client.submit(request(3))
        model.open()
        assert is_double(await kept, 2)
        assert is_double(await again, 3)
        assert model.seen == {0, 2, 3}


@pytest.mark.parametrize("transport", LOCAL.values(), ids=LOCAL)
async def test_a_request_that_a_batch_has_taken_is_left_alone(model: GatedModel, transport: Callable[[], Any]) -> None:
    async with InferenceServer(model, transport()) as server:
        client = server.async_client()
        future = client.submit(request(1))
        await until(model.entered.is_set)
        assert not client.withdraw(future)
        model.open()
        assert is_double(await future, 1)
        assert not client.withdraw(future)
        assert server.stats().cancelled == 0


async def test_a_request_of_which_a_batch_has_taken_some_rows_is_left_alone(model: GatedModel) -> None:
    async with InferenceServer(model, ThreadingTransport(), max_batch_size=2) as server:
        client = server.async_client()
        future = client.submit(request_of(1, 2, 3, 4, 5))
        await until(model.entered.is_set)
        assert not client.withdraw(future)
        model.open()
        assert (await future).batch_size == (5,)


@pytest.mark.parametrize("rows", [1, 3])
async def test_its_room_is_for_callers_that_wait_for_room(model: GatedModel, rows: int) -> None:
    async with busy(model, ThreadingTransport(), max_pending=rows) as (server, _):
        client = server.async_client()
        pending = client.submit(request_of(*range(10, 10 + rows)))
        with pytest.raises(ServerOverloadedError):
            await client.submit(request(1))
        waiting = [asyncio.create_task(client(request(value), wait=True)) for value in range(1, 1 + rows)]
        await asyncio.sleep(0)
        assert server.stats().pending == rows
        assert client.withdraw(pending)
        assert pending.cancelled()
        await until(lambda: server.stats().pending == rows)
        model.open()
        async with asyncio.timeout(HANG):
            for value, reply in enumerate(await asyncio.gather(*waiting), 1):
                assert is_double(reply, value)
        assert model.seen == set(range(1 + rows))


async def test_its_room_is_for_requests_of_other_processes_that_wait_for_room(model: GatedModel) -> None:
    transports = [ThreadingTransport(), MPTransport()]
    async with InferenceServer(model, transports, max_pending=1) as server:
        client = server.async_client()
        with transports[1].client() as remote:
            first = client.submit(request(0))
            await until(model.entered.is_set)
            pending = client.submit(request(1))
            replies: list[TensorDictBase] = []
            thread = threading.Thread(target=lambda: replies.append(remote(request(2), HANG, wait=True)))
            thread.start()
            try:
                await until(lambda: client.withdraw(pending) or pending.done())
                await until(lambda: server.stats().pending == 1)
            finally:
                model.open()
                await asyncio.to_thread(thread.join)
            await first
    assert is_double(replies[0], 2)
    assert model.seen == {0, 2}


async def test_custom_transports_can_not_tell_whether_a_batch_has_taken_a_request(model: GatedModel) -> None:
    async with busy(model, FiveVerbs()) as (server, _):
        client = server.async_client()
        future = client.submit(request(1))
        assert not client.withdraw(future)
        assert client.least_seconds == 0
        model.open()
        assert is_double(await future, 1)


@pytest.mark.parametrize("count", [500, pytest.param(50_000, marks=pytest.mark.stress)])
async def test_each_request_is_either_taken_back_or_computed_and_answered(count: int) -> None:
    seen: list[float] = []
    chance = random.Random(0)

    def model(td: TensorDictBase) -> TensorDictBase:
        seen.extend(td["observation"][:, 0].tolist())
        return double(td)

    async with InferenceServer(model, ThreadingTransport(), max_batch_size=4) as server:
        client = server.async_client()
        futures = []
        withdrawn: set[float] = set()
        for value in range(count):
            futures.append(client.submit(request(value)))
            if value % 5 == 4:
                await asyncio.sleep(0)
            older = max(0, value - chance.randrange(10))
            if client.withdraw(futures[older]):
                withdrawn.add(older)
        async with asyncio.timeout(HANG):
            await asyncio.wait(futures)
        assert server.stats().pending == 0
        assert server.stats().cancelled == len(withdrawn)
        assert server.stats().ok == count - len(withdrawn)
    assert {value for value, future in enumerate(futures) if future.cancelled()} == withdrawn
    assert sorted(seen) == [value for value in range(count) if value not in withdrawn]
    assert all(is_double(future.result(), value) for value, future in enumerate(futures) if value not in withdrawn)


async def test_the_fastest_pass_is_known() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        client = server.async_client()
        assert client.least_seconds == 0
        await client(request(1))
        assert client.least_seconds > 0


# -- deadlines -------------------------------------------------------------------------------------------------


def look(pending: PendingReply) -> None:
    """Let a request see what time it is."""
    if pending.deadline is not None:
        pending.deadline.look()


class Scripted(AsyncInferenceClient):
    """A client that answers nothing, whose requests wait, or are in a batch, as the test says."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[TensorDictBase]] = []
        self.seconds = 0.0

    @property
    def least_seconds(self) -> float:
        return self.seconds

    def submit(self, td: Any = None, **entries: Any) -> asyncio.Future[TensorDictBase]:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return self.waiting[-1]

    async def __call__(self, td: Any = None, timeout: Any = None, *, wait: bool = False, **entries: Any) -> Any:  # noqa: ASYNC109
        raise NotImplementedError

    def is_pending(self, future: asyncio.Future[TensorDictBase]) -> bool:
        return future in self.waiting

    def withdraw(self, future: asyncio.Future[TensorDictBase]) -> bool:
        return future in self.waiting and future.cancel()


async def test_a_request_that_waits_is_given_up_when_it_can_not_be_answered_in_time() -> None:
    client, clock = Scripted(), Clock()
    client.seconds = 3.0
    backend = Backend(client, deadline=1000.0, clock=clock)
    waits, taken = backend.submit(observation(1), 0.0), backend.submit(observation(2), 0.0)
    client.waiting.remove(taken.future)
    clock.now = 996.9
    look(waits)
    look(taken)
    assert not waits.future.done()
    clock.now = 997.1
    look(waits)
    look(taken)
    assert waits.future.cancelled()
    assert not taken.future.done()
    with pytest.raises(DeadlineExceededError, match="1000 seconds"):
        await waits.reply()
    clock.now = 1000.0
    look(taken)
    with pytest.raises(DeadlineExceededError, match="1000 seconds"):
        await taken.reply()


async def test_a_request_that_is_answered_in_time_has_no_deadline_any_more() -> None:
    client, clock = Scripted(), Clock()
    pending = Backend(client, clock=clock).submit(observation(1), 0.0, deadline=1000.0)
    pending.future.set_result(TensorDict({"action": torch.ones(3)}))
    clock.now = 2000.0
    look(pending)
    assert "action" in await pending.reply()


async def test_a_request_without_a_deadline_waits() -> None:
    client, clock = Scripted(), Clock()
    pending = Backend(client, clock=clock).submit(observation(1), 0.0)
    clock.now = 1e9
    look(pending)
    assert not pending.future.done()
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending.reply()


async def test_a_request_may_wait_half_of_its_time_however_long_passes_took() -> None:
    """Else a server whose passes were slow once would refuse everything, and never learn that they are fast again."""
    client, clock = Scripted(), Clock()
    client.seconds = 5000.0
    pending = Backend(client, deadline=1000.0, clock=clock).submit(observation(1), 0.0)
    assert not pending.future.done()
    clock.now = 499.0
    look(pending)
    assert not pending.future.done()
    clock.now = 501.0
    look(pending)
    assert pending.future.cancelled()


async def test_a_deadline_counts_from_the_arrival_and_one_that_has_passed_asks_nobody() -> None:
    client, clock = Scripted(), Clock()
    backend = Backend(client, deadline=1000.0, clock=clock)
    clock.now = 2000.0
    with pytest.raises(DeadlineExceededError, match="10 seconds"):
        backend.submit(observation(1), 1990.0, deadline=10.0)
    with pytest.raises(DeadlineExceededError, match="1000 seconds"):
        backend.submit(observation(1), 0.0)
    assert not client.waiting
    assert not backend.submit(observation(1), 1990.0, deadline=20.0).future.done()


async def test_timers_end_requests() -> None:
    client, clock = Scripted(), Clock()
    client.seconds = 0.005
    backend = Backend(client, deadline=0.01, clock=clock)
    waits, taken = backend.submit(observation(1), 0.0), backend.submit(observation(2), 0.0)
    client.waiting.remove(taken.future)
    clock.now = 0.01
    async with asyncio.timeout(HANG):
        for pending in (waits, taken):
            with pytest.raises(DeadlineExceededError):
                await pending.reply()


async def test_what_waits_behind_a_pass_is_not_computed_when_it_can_not_be_answered_in_time() -> None:
    steps, clock = Steps(), Clock()
    with steps.closed():
        async with InferenceServer(steps, ThreadingTransport(), max_batch_size=1) as server:
            backend = Backend(server, deadline=1000.0, clock=clock)
            steps.go.release()
            await backend.submit(observation(0), 0.0).reply()
            steps.entered.acquire(timeout=HANG)
            least = server.async_client().least_seconds
            assert least > 0
            taken, waits, patient = [
                backend.submit(observation(value), 0.0, deadline=1000.0 + value // 3) for value in (1, 2, 3)
            ]
            await until(lambda: steps.entered.acquire(blocking=False))
            clock.now = 1000.0 - least / 2
            for pending in (taken, waits, patient):
                look(pending)
            assert waits.future.cancelled()
            assert not taken.future.done()
            assert not patient.future.done()
            assert server.stats().pending == 1
            steps.go.release(2)
            async with asyncio.timeout(HANG):
                assert is_double(await taken.reply(), 1)
                assert is_double(await patient.reply(), 3)
                with pytest.raises(DeadlineExceededError):
                    await waits.reply()
            assert server.stats().ok == 3


def body(value: float, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "observation", "shape": [1, 3], "datatype": "FP32", "data": [value] * 3}
    return {"inputs": [tensor], "parameters": parameters}


@pytest.mark.parametrize("transport", [ThreadingTransport, FiveVerbs])
async def test_callers_over_a_network_are_told(model: GatedModel, transport: Callable[[], Any]) -> None:
    async with busy(model, transport()) as (server, _):
        app = create_app(server)
        async with asking(app) as http:
            late = await http.post("/v2/models/policy/infer", json=body(1, timeout=1000))
            assert late.status_code == 504
            assert "0.001 seconds" in late.json()["error"]
            await until(lambda: [outcome for _, outcome in app.front.stats.requests] == ["expired"])
            model.open()
            assert (await http.post("/v2/models/policy/infer", json=body(2, timeout=1e9))).status_code == 200
        assert 1 not in model.seen or transport is FiveVerbs


# -- every kind of server --------------------------------------------------------------------------------------


def asking(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=HANG)


async def ask(http: httpx.AsyncClient, value: float, prefix: str = "") -> None:
    """Ask for actions, and check them."""
    response = await http.post(f"{prefix}/act", json={"observation": [value] * 3})
    assert response.status_code == 200, response.text
    assert response.json()["action"] == [2 * value] * 3


def process_slots() -> ProcessSlotTransport:
    return ProcessSlotTransport(request(0), double(request(0)), num_slots=4)


TRANSPORTS: dict[str, Callable[[], Any]] = {
    "threading": ThreadingTransport,
    "slots": lambda: SlotTransport(4),
    "five-verbs": FiveVerbs,
    "mp": MPTransport,
    "process-slots": process_slots,
}


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
async def test_an_app_serves_whatever_the_transport_is(transport: Callable[[], Any]) -> None:
    async with InferenceServer(double, transport()) as server, asking(create_app(server)) as http:
        for _ in range(2):
            await asyncio.gather(*[ask(http, value) for value in range(4)])


@pytest.mark.parametrize("transport", [MPTransport, process_slots])
async def test_an_app_serves_a_server_found_by_its_address(transport: Callable[[], Any]) -> None:
    with InferenceServer(double, transport()) as server, connect(server.address) as remote:
        async with hosted(create_app(remote)) as url, httpx.AsyncClient(base_url=url, timeout=HANG) as http:
            await asyncio.gather(*[ask(http, value) for value in range(4)])


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
async def test_an_app_serves_by_a_client_that_it_is_given(transport: Callable[[], Any]) -> None:
    async with (
        InferenceServer(double, transport()) as server,
        server.async_client() as client,
        asking(create_app(client)) as http,
    ):
        for value in range(3):
            await ask(http, value)


async def test_requests_have_a_slot_each_and_what_is_beyond_is_refused(model: GatedModel) -> None:
    transport = SlotTransport(3)
    async with InferenceServer(model, transport) as server:
        app = create_app(server)
        async with asking(app) as http:
            asked = [asyncio.create_task(ask(http, value)) for value in range(3)]
            await until(lambda: app.front.stats.inflight == 3)
            refused = await http.post("/act", json={"observation": [9, 9, 9]})
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            await until(lambda: app.front.stats.requests["act", "rejected"] == 1)
            model.open()
            await asyncio.gather(*asked)
            for value in range(5):
                await ask(http, value)
        assert transport.callers() == 3
        app.front.backend.close()
        assert transport.callers() == 0
        assert 9 not in model.seen


async def test_a_client_with_one_slot_serves_one_request_at_a_time(model: GatedModel) -> None:
    async with InferenceServer(model, SlotTransport(1)) as server, server.async_client() as client:
        app = create_app(client)
        async with asking(app) as http:
            asked = asyncio.create_task(ask(http, 1))
            await until(model.entered.is_set)
            refused = await http.post("/act", json={"observation": [9, 9, 9]})
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            model.open()
            await asked
            await ask(http, 2)


async def test_a_slot_is_free_as_soon_as_its_caller_has_gone(model: GatedModel) -> None:
    async with busy(model, SlotTransport(2)) as (server, _):
        backend = Backend(server)
        for value in range(1, 4):
            pending = backend.submit(observation(value), 0.0)
            with pytest.raises(NoFreeSlotError):
                backend.submit(observation(9), 0.0)
            pending.cancel()
            backend.finish(pending)
        last = backend.submit(observation(4), 0.0)
        model.open()
        assert is_double(await last.reply(), 4)
        backend.close()
    assert model.seen == {0, 4}


async def test_requests_of_clients_without_slots_share_one_connection() -> None:
    transport = MPTransport()
    async with InferenceServer(double, transport) as server:
        backend = Backend(server)
        pending = [backend.submit(observation(value), 0.0) for value in range(20)]
        for value, one in enumerate(pending):
            assert is_double(await one.reply(), value)
        assert transport.callers() is None or transport.callers() == 1
        backend.close()


# -- lifespan --------------------------------------------------------------------------------------------------


async def test_an_app_that_runs_alone_starts_its_server_and_ends_it() -> None:
    server = InferenceServer(double, SlotTransport(2))
    app = create_app(server)
    for _ in range(2):
        async with hosted(app) as url, httpx.AsyncClient(base_url=url, timeout=HANG) as http:
            assert server.is_alive
            await ask(http, 1)
        assert not server.is_alive
        app.front.draining = ""


async def test_a_server_that_runs_already_goes_on_when_the_app_ends() -> None:
    async with InferenceServer(double, SlotTransport(2)) as server:
        async with hosted(create_app(server)) as url, httpx.AsyncClient(base_url=url, timeout=HANG) as http:
            await ask(http, 1)
        assert server.is_alive
        assert server.transport.callers() == 0  # type: ignore[attr-defined]
        assert is_double(await server.async_client()(request(1)), 1)


async def test_an_app_that_runs_alone_starts_a_server_in_a_process_of_its_own() -> None:
    server = forked(make_double)
    async with hosted(create_app(server)) as url, httpx.AsyncClient(base_url=url, timeout=HANG) as http:
        assert server.is_alive
        await asyncio.gather(*[ask(http, value) for value in range(4)])
    assert not server.is_alive


async def test_an_app_says_why_its_server_does_not_start() -> None:
    server = ProcessInferenceServer(make_double, MPTransport())
    server.shutdown()
    told: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        told.append(message)

    await create_app(server)({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in told] == ["lifespan.startup.failed"]
    assert "shut down" in told[0]["message"]


async def test_an_app_that_is_mounted_serves_by_the_server_of_the_other_app() -> None:
    server = InferenceServer(double, ThreadingTransport())
    inner = create_app(server)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with server:
            yield
            await inner.drain()

    outer = Starlette(routes=[Mount("/policy", inner)], lifespan=lifespan)
    async with hosted(outer) as url, httpx.AsyncClient(base_url=url, timeout=HANG) as http:
        await ask(http, 1, "/policy")
    assert not server.is_alive
