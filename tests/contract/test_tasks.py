"""Tasks on event loops: embedded servers, several loops at once, cancellation at every moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from aioinfer import (
    DispatchReason,
    InferenceServer,
    InferenceTransport,
    MPTransport,
    ProcessSlotTransport,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.transports import queue
from tests.limits import HANG
from tests.transports import TRANSPORTS


def loop_factories() -> list[Any]:
    try:
        import uvloop
    except ImportError:  # it does not exist for Windows
        return [asyncio.new_event_loop]
    return [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture(params=loop_factories(), ids=lambda factory: factory.__module__.split(".")[0])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    def run(main: Any) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main)

    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG):
        while not condition():  # noqa: ASYNC110 - what happens in other threads sets no event of this loop
            await asyncio.sleep(0.001)


@pytest.fixture
def tasks_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a loaded machine the server would give up on tasks that its replies have woken."""
    monkeypatch.setattr(queue, "LINGER", HANG)
    monkeypatch.setattr(queue, "MOST_LINGER", HANG)


@pytest.mark.usefixtures("tasks_take_their_time")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tasks_of_an_embedding_loop_meet_in_one_pass(run: Any, transport: str) -> None:
    async def main() -> None:
        wire = TRANSPORTS[transport]()
        async with InferenceServer(double, wire) as server:
            if isinstance(wire, ProcessSlotTransport | MPTransport):  # what shares a tick must share a connection
                clients = wire.async_clients(16)
            else:
                clients = [server.async_client() for _ in range(16)]
            for turn in range(10):
                replies = await asyncio.gather(*(client(request(i + turn)) for i, client in enumerate(clients)))
                assert [reply["action"][0].item() for reply in replies] == [2 * (i + turn) for i in range(16)]
            if transport != "five-verbs":  # its requests are there one by one, not tick by tick
                assert server.stats().mean_batch_size == 16

    run(main())


@pytest.mark.usefixtures("tasks_take_their_time")
@pytest.mark.parametrize("make", [ThreadingTransport, lambda: SlotTransport(3)], ids=["threading", "slots"])
def test_a_model_thread_that_comes_in_the_middle_of_a_tick_waits_for_its_end(run: Any, make: Any) -> None:
    async def main() -> None:
        model, transport = GatedModel(), make()
        async with InferenceServer(model, transport) as server:
            first = server.client().submit(request(0))  # its reply wakes no task
            await until(model.entered.is_set)
            clients = [server.async_client() for _ in range(2)]
            replies = [clients[0].submit(request(1))]
            model.open()
            # The loop is blocked, in the middle of a tick.
            eventually(lambda: first.done() and transport.queue.is_waited_for)
            replies.append(clients[1].submit(request(2)))
            await asyncio.gather(*replies)
            assert sum(server.stats().batches.values()) == 2

    run(main())


def test_a_batch_wakes_its_loop_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        model = GatedModel()
        async with InferenceServer(model, ThreadingTransport()) as server:
            client = server.async_client()
            replies = [client.submit(request(value)) for value in range(32)]
            await until(model.entered.is_set)
            wake_ups: list[Any] = []
            call_soon = loop.call_soon_threadsafe
            loop.call_soon_threadsafe = lambda *args, **options: wake_ups.append(args) or call_soon(*args, **options)  # type: ignore[method-assign, func-returns-value]
            model.open()
            await asyncio.gather(*replies)
            assert len(wake_ups) == 1

    asyncio.run(main())


@pytest.mark.usefixtures("tasks_take_their_time")
def test_batches_stay_whole_where_more_tasks_ask_than_a_batch_holds(run: Any) -> None:
    async def main() -> None:
        async with InferenceServer(double, ThreadingTransport(), max_batch_size=8) as server:
            client = server.async_client()

            async def ask() -> None:
                for value in range(40):
                    await client(request(value))

            await asyncio.gather(*(ask() for _ in range(9)))
            assert server.stats().batches[DispatchReason.FULL] >= 40

    run(main())


@pytest.mark.usefixtures("tasks_take_their_time")
def test_a_lone_request_is_not_held_back_for_tasks_that_do_not_ask_again() -> None:
    async def main() -> None:
        async with InferenceServer(double, ThreadingTransport()) as server, asyncio.timeout(HANG / 2):
            client = server.async_client()
            await asyncio.gather(*(client(request(value)) for value in range(9)))
            await client(request(1))
            assert (await asyncio.to_thread(server.client(), request(2)))["action"][0] == 4

    asyncio.run(main())


def test_the_loop_runs_while_the_model_does(run: Any) -> None:
    async def main() -> None:
        model = GatedModel()
        async with InferenceServer(model, ThreadingTransport()) as server:
            reply = server.async_client().submit(request(1))
            await until(model.entered.is_set)
            for _ in range(1000):  # a blocked loop could not tick, and the gate would stay closed
                await asyncio.sleep(0)
            assert not reply.done()
            model.open()
            await reply

    run(main())


@contextmanager
def loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_tasks_of_several_loops_and_threads_share_one_server_and_one_client() -> None:
    wrong: list[float] = []

    with InferenceServer(double, ThreadingTransport(), max_batch_size=16) as server:
        shared, blocking = server.async_client(), server.client()

        async def ask(start: int) -> None:
            for value in range(start, start + 200):
                if (await shared(request(value)))["action"][0] != 2 * value:
                    wrong.append(value)

        def call(start: int) -> None:
            for value in range(start, start + 200):
                if blocking(request(value), HANG)["action"][0] != 2 * value:
                    wrong.append(value)

        with loop_in_thread() as one, loop_in_thread() as other:
            tasks = [
                asyncio.run_coroutine_threadsafe(ask(1000 * index), loop) for index in range(8) for loop in (one, other)
            ]
            threads = [threading.Thread(target=call, args=(100_000 * index,)) for index in range(1, 9)]
            for thread in threads:
                thread.start()
            for task in tasks:
                task.result(HANG)
            for thread in threads:
                thread.join()
        assert not wrong
        assert server.stats().ok == 200 * 24


def test_a_loop_that_is_gone_costs_nobody_else_a_reply() -> None:
    model = GatedModel()
    with InferenceServer(model, ThreadingTransport()) as server:

        async def leave() -> None:
            server.async_client().submit(request(1))
            await asyncio.sleep(0)
            await until(lambda: model.entered.is_set() or server.stats().pending == 1)

        asyncio.run(leave())
        assert model.entered.wait(HANG)
        reply = server.client().submit(request(2))
        model.open()
        assert reply.result(HANG)["action"][0] == 4


def test_one_client_serves_one_loop_after_the_other() -> None:
    with InferenceServer(double, ThreadingTransport()) as server:
        client = server.async_client()
        for value in range(3):
            assert asyncio.run(client(request(value)))["action"][0] == 2 * value


@pytest.mark.parametrize("make", [ThreadingTransport, lambda: SlotTransport(16)])
async def test_cancelling_at_every_moment_leaves_the_others_alone(make: Callable[[], InferenceTransport]) -> None:
    async with InferenceServer(double, make(), max_batch_size=4) as server:
        clients = [server.async_client() for _ in range(16)]

        async def steady(client: Any, start: int) -> None:
            for value in range(start, start + 100):
                assert (await client(request(value)))["action"][0] == 2 * value

        async def fickle(client: Any, patience: int) -> None:
            for _ in range(50):
                task = asyncio.ensure_future(client(request(-1)))
                for _ in range(patience):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    assert (await task)["action"][0] == -2
                except asyncio.CancelledError:
                    pass

        async with asyncio.TaskGroup() as group:
            for index, client in enumerate(clients):
                group.create_task(steady(client, 1000 * index) if index % 2 else fickle(client, index))
        stats = server.stats()
    assert stats.ok + stats.cancelled >= 800
    assert stats.failed == 0


async def test_a_deadline_covers_the_time_in_the_queue() -> None:
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport()) as server:
        client = server.async_client()
        first = client.submit(request(0))
        await until(model.entered.is_set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await client(request(1))
        assert server.stats().pending == 0
        model.open()
        await first
    assert model.seen == {0}


async def test_a_slot_takes_one_request_at_a_time_and_is_free_after_a_cancellation() -> None:
    model = GatedModel()
    async with InferenceServer(model, SlotTransport(1)) as server:
        client = server.async_client()
        first = client.submit(request(0))
        with pytest.raises(RuntimeError, match="under way"):
            client.submit(request(1))
        first.cancel()
        second = client.submit(request(2))
        model.open()
        assert (await second)["action"][0] == 4


async def test_waiting_for_room_is_first_come_first_served_and_may_be_cancelled() -> None:
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport(), max_pending=1, max_batch_size=1) as server:
        client = server.async_client()
        first = client.submit(request(0))
        await until(model.entered.is_set)
        tasks = [asyncio.ensure_future(client(request(value), wait=True)) for value in range(1, 8)]
        await asyncio.sleep(0)
        for index in (1, 3):
            tasks[index].cancel()
        model.open()
        await asyncio.wait([*tasks, first])
    assert model.batches == [[0], [1], [3], [5], [6], [7]]


@pytest.mark.usefixtures("tasks_take_their_time")
async def test_a_request_belongs_to_the_tick_in_which_it_was_made() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        client = server.async_client()
        await client(request(0))
        server.stats(reset=True)
        started = time.perf_counter()
        replies = [client.submit(request(value)) for value in range(10)]
        await asyncio.gather(*replies)
        assert server.stats().mean_batch_size == 10
        assert time.perf_counter() >= started


async def test_replies_of_ten_thousand_tasks_are_their_own() -> None:
    async with InferenceServer(
        lambda td: TensorDict({"action": td["observation"] + 1}, batch_size=td.batch_size), ThreadingTransport()
    ) as server:
        client = server.async_client()
        replies = await asyncio.gather(*(client(request(value, size=1)) for value in range(10_000)))
    assert torch.equal(torch.cat([reply["action"] for reply in replies]), torch.arange(10_000.0) + 1)
