"""A paused server runs no forward pass; what is pending waits, is served first, or is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aioinfer import (
    InferenceServer,
    InferenceTransport,
    MPTransport,
    ProcessSlotTransport,
    ServerClosedError,
    ServerPausedError,
    ThreadingTransport,
)
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import has_pending_job
from tests.limits import HANG
from tests.transports import TRANSPORTS
from tests.weight_models import mark_of, policy


@pytest.fixture(params=TRANSPORTS)
def make(request: pytest.FixtureRequest) -> Callable[[], InferenceTransport]:
    return TRANSPORTS[request.param]


def test_pending_requests_are_kept_until_the_server_goes_on(make: Callable[[], InferenceTransport]) -> None:
    passes: list[int] = []
    with InferenceServer(lambda td: passes.append(1) or double(td), make()) as server:  # type: ignore[func-returns-value]
        with server.paused():
            asked = [server.client().submit(request(value)) for value in range(5)]
            eventually(lambda: server.stats().pending == 5)
            assert not passes
            assert not any(future.done() for future in asked)
        for value, future in enumerate(asked):
            assert is_double(future.result(HANG), value)


def test_pending_requests_are_served_first_where_that_is_asked_for(make: Callable[[], InferenceTransport]) -> None:
    gate = GatedModel()
    with InferenceServer(gate, make(), max_batch_size=2) as server, ThreadPoolExecutor(1) as pool:
        asked = [server.client().submit(request(0))]
        assert gate.entered.wait(HANG)
        asked += [server.client().submit(request(value)) for value in range(1, 7)]
        eventually(lambda: server.stats().pending == 6)  # a client of another process sends when it is accepted
        inside, leave = threading.Event(), threading.Event()

        def pause() -> list[bool]:
            with server.paused(pending="wait"):
                inside.set()
                done = [is_double(future.result(HANG), value) for value, future in enumerate(asked)]
                assert leave.wait(HANG)
                return done

        pausing = pool.submit(pause)
        assert not inside.wait(0.05)  # the pass that runs, and those to come, are not over
        gate.open()
        assert inside.wait(HANG)
        late = server.client().submit(request(9))
        passes = len(gate.batches)
        leave.set()
        assert all(pausing.result(HANG))
        assert is_double(late.result(HANG), 9)
        assert len(gate.batches) == passes + 1


def test_pending_requests_are_refused_where_that_is_asked_for(make: Callable[[], InferenceTransport]) -> None:
    gate = GatedModel()
    with InferenceServer(gate, make()) as server, ThreadPoolExecutor(1) as pool:
        client = server.client()
        gate.open()
        for _ in range(2):  # with the second reply, a client in another process knows that it is accepted
            client(request(0), HANG)
        gate.close()
        running = client.submit(request(0))
        assert gate.entered.wait(HANG)
        asked = [server.client().submit(request(value)) for value in range(1, 4)]
        eventually(lambda: server.stats().pending == 3)
        leave = threading.Event()

        def pause() -> None:
            with server.paused(pending="reject"):
                assert leave.wait(HANG)

        pausing = pool.submit(pause)
        eventually(lambda: has_pending_job(server))  # else the requests may be served before it is asked for
        gate.open()
        for future in asked:
            with pytest.raises(ServerPausedError):
                future.result(HANG)
        with pytest.raises(ServerPausedError):
            server.client()(request(4), HANG, wait=True)
        assert is_double(running.result(HANG), 0)
        leave.set()
        pausing.result(HANG)
        assert is_double(server.client()(request(5), HANG), 5)
        assert gate.seen == {0.0, 5.0}
        # A request of another process whose client finds the pause first is refused or cancelled there.
        remote = isinstance(server.transport, MPTransport | ProcessSlotTransport)

        def refused() -> int:
            stats = server.stats()
            return stats.rejected + (stats.cancelled if remote else 0)

        eventually(lambda: refused() == 4)


async def test_a_pause_can_be_awaited_and_nested() -> None:
    passes: list[int] = []
    async with InferenceServer(
        lambda td: passes.append(1) or double(td),  # type: ignore[func-returns-value]
        ThreadingTransport(),
    ) as server:
        client = server.async_client()
        async with server.paused():
            with server.paused("wait"):
                asked = client.submit(request(1))
            await asyncio.sleep(0.01)
            assert not passes
        assert is_double(await asyncio.wait_for(asked, HANG), 1)


async def test_a_pause_that_is_cancelled_while_it_begins_leaves_nothing_behind() -> None:
    gate = GatedModel()
    async with InferenceServer(gate, ThreadingTransport()) as server:
        asked = server.async_client().submit(request(1))
        assert await asyncio.to_thread(gate.entered.wait, HANG)

        async def pause() -> None:
            async with server.paused(pending="reject"):
                raise AssertionError("it can't have begun")

        pausing = asyncio.ensure_future(pause())
        await asyncio.sleep(0.01)
        pausing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pausing
        late = server.async_client().submit(request(2))  # before the model thread gets to the pause
        gate.open()
        assert is_double(await asked, 1)
        assert is_double(await asyncio.wait_for(late, HANG), 2)


async def test_a_server_that_shuts_down_before_a_pause_begins_says_so() -> None:
    server = InferenceServer(double, ThreadingTransport())
    async with server:
        pauses = [server.paused(), server.paused("reject")]
    with pytest.raises(ServerClosedError, match="before the pause began"):
        async with pauses[0]:
            raise AssertionError("it can't have begun")
    with pytest.raises(ServerClosedError, match="before the pause began"), pauses[1]:
        raise AssertionError("it can't have begun")


def test_pauses_of_many_threads_leave_the_server_open() -> None:
    with InferenceServer(double, ThreadingTransport()) as server, ThreadPoolExecutor(8) as pool:

        def pause() -> None:
            for _ in range(50):
                with server.paused("reject"):
                    pass

        for pausing in [pool.submit(pause) for _ in range(8)]:
            pausing.result(HANG)
        assert is_double(server.client()(request(1), HANG), 1)


def test_weights_can_be_updated_inside() -> None:
    with InferenceServer(policy(1.0), ThreadingTransport()) as server:
        with server.paused():
            asked = server.client().submit(request(0))
            server.update_weights(policy(2.0))
        assert mark_of(asked.result(HANG)) == 2


@pytest.mark.parametrize("pending", ["keep", "wait", "reject"])
def test_a_server_can_shut_down_and_start_again_inside(pending: Any) -> None:
    server = InferenceServer(double, ThreadingTransport()).start()
    with server.paused(pending):
        if pending == "keep":
            asked = server.client().submit(request(1))
        server.shutdown()
        if pending == "keep":
            with pytest.raises(ServerClosedError):
                asked.result(HANG)
        server.start()
        assert is_double(server.client()(request(2), HANG), 2)
    assert is_double(server.client()(request(3), HANG), 3)
    server.shutdown()


def test_bad_ways_to_pause_are_refused() -> None:
    server = InferenceServer(double, ThreadingTransport())
    with pytest.raises(RuntimeError, match="does not run"):
        server.paused()
    with server, pytest.raises(ValueError, match='"keep", "wait" or "reject"'):
        server.paused("abort")  # type: ignore[arg-type]


def test_a_pause_that_serves_first_serves_nothing_inside_another() -> None:
    passes: list[int] = []
    with InferenceServer(lambda td: passes.append(1) or double(td), ThreadingTransport()) as server:  # type: ignore[func-returns-value]
        with server.paused():
            asked = server.client().submit(request(1))
            with server.paused("wait"):
                assert not passes
            assert not asked.done()
        assert is_double(asked.result(HANG), 1)
