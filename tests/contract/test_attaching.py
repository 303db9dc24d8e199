"""Servers take and leave transports whole: checked first, bounded exactly, ended without blocking anybody."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from aioinfer import (
    ClientBusyError,
    ClientClosedError,
    InferenceServer,
    InferenceTransport,
    MPTransport,
    NoFreeSlotError,
    ProcessSlotTransport,
    ServerClosedError,
    ServerNotRunningError,
    ServerOverloadedError,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.transports.ipc.server import RemoteRequest
from aioinfer.transports.queue import RequestQueue
from tests.limits import HANG
from tests.switching import switch_interval
from tests.transports import FIXED_LAYOUT, REMOTE, TRANSPORTS, FiveVerbs

# -- attached after everything was checked ------------------------------------------------------------------


@pytest.mark.parametrize("joined", [True, False])
def test_a_refused_second_server_leaves_the_running_one_alone(joined: bool) -> None:
    transport, other = ThreadingTransport(), ThreadingTransport()
    with InferenceServer(double, transport) as server:
        client = server.client()
        assert is_double(client(request(1), HANG), 1)
        with pytest.raises(RuntimeError, match="running server already"):
            InferenceServer(double, [other, transport] if joined else transport)
        for value in range(3):
            assert is_double(client(request(value), HANG), value)
        with InferenceServer(double, other) as second:  # the other one was not taken either
            assert is_double(second.client()(request(4), HANG), 4)
        started = time.monotonic()
        server.shutdown(HANG)
    assert time.monotonic() - started < HANG / 2


def test_transports_that_cannot_all_be_opened_are_left_to_others(tmp_path: Any) -> None:
    first, taken = ThreadingTransport(), MPTransport(address=str(tmp_path / "socket"))
    server = InferenceServer(double, [first, taken]).start()
    server.shutdown()
    with MPTransportAt(tmp_path / "socket"):
        with pytest.raises(OSError, match="in use"):
            server.start()
        with InferenceServer(double, first) as alone:
            assert is_double(alone.client()(request(1), HANG), 1)


def test_requests_end_where_not_all_transports_can_be_opened(tmp_path: Path) -> None:
    taken = MPTransport(address=str(tmp_path / "socket"))
    InferenceServer(double, taken).shutdown()
    with MPTransportAt(tmp_path / "socket"):
        custom, local = FiveVerbs(), ThreadingTransport()
        asked = [transport.client().submit(request(1)) for transport in (custom, local)]
        with pytest.raises(OSError, match="in use"):
            InferenceServer(double, [custom, local, taken])
        for future in asked:
            assert isinstance(future.exception(HANG), ServerClosedError)
        with InferenceServer(double, [custom, local]):
            for transport in (custom, local):
                assert is_double(transport.client()(request(2), HANG), 2)


class MPTransportAt:
    """Somebody else who listens at an address."""

    def __init__(self, path: Any) -> None:
        self._server = InferenceServer(double, MPTransport(address=str(path)))

    def __enter__(self) -> None:
        self._server.start()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


@pytest.mark.parametrize("bad", ["auto", None, 3, ["auto"], [ThreadingTransport(), "auto"]])
def test_what_is_no_transport_is_refused_by_name(bad: Any) -> None:
    with pytest.raises(TypeError, match="must be an InferenceTransport"):
        InferenceServer(double, bad)


def test_lists_of_transports_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one"):
        InferenceServer(double, [])
    one = ThreadingTransport()
    with pytest.raises(ValueError, match="twice"):
        InferenceServer(double, [one, one])
    custom = FiveVerbs()
    with pytest.raises(ValueError, match="twice"):
        InferenceServer(double, [custom, one, custom])


# -- bounds ------------------------------------------------------------------------------------------------


def test_the_bound_is_exact_over_all_transports_of_a_server() -> None:
    with switch_interval(1e-6):
        transports = [ThreadingTransport() for _ in range(4)]
        server = InferenceServer(double, transports, max_pending=5)
        taken = 0
        for _ in range(20):
            futures: list[Any] = []
            start = threading.Barrier(8)

            def submit(transport: ThreadingTransport, start: Any = start, futures: Any = futures) -> None:
                start.wait(HANG)
                futures.extend(transport.submit(request(1)) for _ in range(4))

            threads = [threading.Thread(target=submit, args=(transports[i % 4],)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(futures) == 32
            refused = [future for future in futures if future.done()]
            assert all(isinstance(future.exception(), ServerOverloadedError) for future in refused)
            assert server.stats().pending == 5
            assert len(futures) - len(refused) == 5
            taken += 5
            for future in futures:
                future.cancel()
        assert server.stats().cancelled <= taken
        server.shutdown()


class ServerConnection:
    """Stands for a connection of another process, whose requests wait for room."""

    def __init__(self, transport: ThreadingTransport) -> None:
        self.transport: Any = transport
        self.answered: list[int] = []
        self.failed: list[int] = []

    def ask(self, number: int) -> None:
        line: Any = self
        self.transport.queue.put_remote(RemoteRequest(request(number), line, number, 0.0, None), wait=True)

    def set_results(self, receivers: Any, replies: Any) -> None:
        self.answered += [receiver.number for receiver in receivers]

    def set_exceptions(self, receivers: Any, errors: Any) -> None:
        self.failed += [receiver.number for receiver in receivers]

    def discard(self, receiver: Any) -> None: ...


def test_closing_ends_those_that_wait_for_room_however_it_races() -> None:
    """From other processes' side of the queue: some wait for room while another thread closes."""
    for _ in range(60):
        server = InferenceServer(double, transport := ThreadingTransport(), max_pending=1)
        queue: RequestQueue = transport.queue
        connection = ServerConnection(transport)
        for number in range(60):
            connection.ask(number)
        taken: list[Any] = []
        start = threading.Barrier(2)

        def take(queue: Any = queue, taken: Any = taken, start: Any = start) -> None:
            start.wait(HANG)
            for _ in range(60):
                taken.extend(queue.get_batch(1))

        thread = threading.Thread(target=take)
        thread.start()
        start.wait(HANG)
        server.shutdown()
        thread.join(HANG)
        assert sorted(connection.failed + [one.number for one in taken]) == list(range(60))


def test_requests_that_wait_for_room_still_do_so_when_their_transport_goes_to_another_server() -> None:
    transport = ThreadingTransport()
    first = InferenceServer(double, transport, max_pending=1)
    connection = ServerConnection(transport)
    for number in range(4):
        connection.ask(number)
    assert first.stats().pending == 1
    second = InferenceServer(double, transport, max_pending=1)
    assert second.stats().pending == 1
    with second:
        eventually(lambda: len(connection.answered) == 4)
    assert not connection.failed


# -- ends --------------------------------------------------------------------------------------------------


async def test_aclose_does_not_block_its_loop_whatever_the_transport_does() -> None:
    server = InferenceServer(GatedModel(), transport := MPTransport())
    detach, finishing, ticked = transport.detach, threading.Event(), threading.Event()
    loop_ran: list[bool] = []

    def slow(error: ServerClosedError) -> None:
        finishing.set()
        loop_ran.append(ticked.wait(HANG))
        detach(error)

    transport.detach = slow  # type: ignore[method-assign]
    await server.__aenter__()

    async def tick() -> None:
        await asyncio.to_thread(finishing.wait, HANG)
        ticked.set()

    client = server.client()
    future = client.submit(request(1))
    model = server.model
    assert isinstance(model, GatedModel)
    await asyncio.to_thread(model.entered.wait, HANG)
    ticking = asyncio.ensure_future(tick())
    await server.aclose(timeout=0.1)
    await ticking
    model.open()
    assert all(loop_ran)
    assert loop_ran
    with pytest.raises(ServerClosedError):
        await asyncio.to_thread(future.result, HANG)
    await asyncio.to_thread(eventually, lambda: not server.is_alive)
    client.close()


async def test_aclose_of_a_hosted_server_needs_no_thread_of_anybodys_pool() -> None:
    """All of anyio's threads may be callers that wait for this very server."""
    model = GatedModel()
    server = InferenceServer(model, ThreadingTransport(), max_batch_size=1).start()
    limiter = anyio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 4
    ended: list[type[BaseException]] = []

    def call() -> None:
        try:
            server.client()(request(1), HANG)
        except ServerClosedError as error:
            ended.append(type(error))

    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(anyio.to_thread.run_sync, call)
            await asyncio.to_thread(eventually, lambda: server.stats().pending == 3)
            with anyio.fail_after(HANG / 2):
                await server.aclose(timeout=0.5)
    finally:
        limiter.total_tokens = before
        model.open()
    assert len(ended) == 4
    await asyncio.to_thread(eventually, lambda: not server.is_alive)


async def test_a_background_task_that_fails_is_logged_and_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    server = InferenceServer(double, transport := ThreadingTransport())
    runs: list[int] = []
    again = asyncio.Event()

    async def serve() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise OSError(24, "Too many open files")
        again.set()

    transport.serve = serve  # type: ignore[method-assign]
    async with server:
        await asyncio.wait_for(again.wait(), HANG)
        assert is_double(await server.async_client()(request(1)), 1)
    assert "Too many open files" in caplog.text
    assert len(runs) == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name not in {"five-verbs"}])
def test_a_forked_child_of_a_client_is_told_or_connects_anew_at_once(transport: str) -> None:
    context = multiprocessing.get_context("fork")
    with InferenceServer(double, TRANSPORTS[transport]()) as server:
        client, other = server.client(), server.client()
        assert is_double(client(request(1), HANG), 1)
        ours, theirs = context.Pipe()

        def child() -> None:
            try:
                theirs.send(float((client if transport not in FIXED_LAYOUT else other)(request(2), HANG)["action"][0]))
            except Exception as error:
                theirs.send(f"{type(error).__name__}: {error}")
            server.shutdown()
            os._exit(0)

        process = context.Process(target=child)
        process.start()
        try:
            assert ours.poll(HANG)
            told = ours.recv()
        finally:
            process.kill()
            process.join()
        if transport in REMOTE:
            assert told == 4
        else:
            assert told.startswith("ServerClosedError")
            assert "forked" in told
        assert is_double(client(request(3), HANG), 3)


# -- clients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_closed_client_takes_no_request_and_others_go_on(transport: str) -> None:
    with InferenceServer(double, TRANSPORTS[transport]()) as server:
        kept = server.client()
        with server.client() as client:
            assert is_double(client(request(1), HANG), 1)
        client.close()
        with pytest.raises(ClientClosedError):
            client(request(2), HANG)
        with pytest.raises(ClientClosedError):
            client.submit(request(2))
        assert is_double(kept(request(3), HANG), 3)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_closed_awaitable_client_takes_no_request_and_others_go_on(transport: str) -> None:
    async with InferenceServer(double, TRANSPORTS[transport]()) as server:
        kept = server.async_client()
        async with server.async_client() as client:
            assert is_double(await client(request(1), HANG), 1)
        client.close()
        with pytest.raises(ClientClosedError):
            await client(request(2))
        with pytest.raises(ClientClosedError):
            client.submit(request(2))
        assert is_double(await kept(request(3)), 3)


@pytest.mark.parametrize("preallocate", [True, False])
def test_a_closed_client_gives_its_slot_to_the_next(preallocate: bool) -> None:
    model = GatedModel()
    transport = SlotTransport(2, preallocate=preallocate)
    with InferenceServer(model, transport) as server:
        first = server.client().submit(request(0))
        assert model.entered.wait(HANG)
        second = server.client()
        future = second.submit(request(1))
        with pytest.raises(NoFreeSlotError, match="close a client"):
            server.clients(1)
        with pytest.raises(ClientBusyError):
            second.submit(request(2))
        second.close()
        with pytest.raises(ClientClosedError):
            future.result(HANG)
        assert transport.callers() == 1
        third = server.client().submit(request(3))
        model.open()
        assert is_double(first.result(HANG), 0)
        assert is_double(third.result(HANG), 3)
        assert 1 not in model.seen or preallocate


def test_clients_are_made_all_or_none() -> None:
    transport = SlotTransport(3)
    server = InferenceServer(double, transport)
    with pytest.raises(NoFreeSlotError):
        server.clients(4)
    assert transport.callers() == 0
    assert len(server.async_clients(3)) == 3
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="number of clients"):
            server.clients(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: SlotTransport(4), lambda: SlotTransport(4, preallocate=True)])
def test_two_threads_that_share_a_client_with_a_slot_are_told_or_served(make: Callable[[], InferenceTransport]) -> None:
    wrong: list[float] = []
    served = [0, 0, 0]
    with switch_interval(1e-5), InferenceServer(double, make()) as server:
        client = server.client()

        def call(thread: int) -> None:
            for value in range(1000 * thread, 1000 * thread + 400):
                try:
                    if not is_double(client(request(value), HANG), value):
                        wrong.append(value)
                    served[thread] += 1
                except ClientBusyError:
                    pass

        threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * HANG)
        assert not any(thread.is_alive() for thread in threads)
        assert is_double(client(request(5), HANG), 5)
    assert not wrong
    assert sum(served) > 0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_refusals_reach_a_caller_the_same_way_on_every_transport(transport: str) -> None:
    """``submit`` returns a future that fails; a call raises."""
    model = GatedModel()
    server = InferenceServer(model, TRANSPORTS[transport](), max_pending=1)
    async with server:
        blocking = [server.client() for _ in range(3)]
        first = blocking[0].submit(request(0))
        assert await asyncio.to_thread(model.entered.wait, HANG)
        second = blocking[1].submit(request(1))
        await asyncio.to_thread(eventually, lambda: server.stats().pending == 1)
        awaitable = server.async_client()
        overloaded = blocking[2].submit(request(2))
        with pytest.raises(ServerOverloadedError):
            await asyncio.to_thread(overloaded.result, HANG)
        overloaded_here = awaitable.submit(request(3))
        with pytest.raises(ServerOverloadedError):
            await asyncio.wait_for(overloaded_here, HANG)
        model.open()
        for value, future in enumerate((first, second)):
            assert is_double(await asyncio.to_thread(future.result, HANG), value)
        async with server.paused("reject"):
            for refused in (blocking[2].submit(request(4)), awaitable.submit(request(5))):
                with pytest.raises(Exception, match="paused"):
                    await asyncio.wait_for(_both_kinds(refused), HANG)
    for refused in (blocking[2].submit(request(6)), awaitable.submit(request(7))):
        with pytest.raises(ServerClosedError):
            await asyncio.wait_for(_both_kinds(refused), HANG)


def _both_kinds(future: Any) -> Any:
    return future if isinstance(future, asyncio.Future) else asyncio.wrap_future(future)


# -- the same verbs everywhere -----------------------------------------------------------------------------


def test_health_says_what_a_server_does() -> None:
    server = InferenceServer(double, ThreadingTransport())
    assert (server.health().alive, server.health().ready) == (False, False)
    assert server.health().reason == "the server was not started"
    with pytest.raises(ServerNotRunningError):
        server.paused()
    with server:
        health = server.health()
        assert (health.alive, health.ready, health.pid, health.policy_version) == (True, True, os.getpid(), 0)
        assert (health.pending, health.reason, health.exit_code) == (0, "", None)
        assert server.max_batch_size == 64
        with pytest.raises(AttributeError, match="no address"):
            _ = server.address
    assert not server.health().ready
    assert "shut down" in server.health().reason


async def test_awaitable_twins_say_the_same() -> None:
    slots = ProcessSlotTransport(request(0), double(request(0)), num_slots=2)
    async with InferenceServer(double, [ThreadingTransport(), slots]) as server:
        assert await server.ahealth() == server.health()
        assert (await server.astats()).ok == 0
        assert server.address == slots.address
        assert server.transports[1] is slots
        assert is_double(await server.async_client(copy=False)(request(2)), 2)
