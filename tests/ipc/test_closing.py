"""Clients that are closed: what they had is there for others at once."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from aioinfer import (
    AsyncInferenceClient,
    ClientClosedError,
    InferenceServer,
    MPTransport,
    NoFreeSlotError,
    connect,
)
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.transports.ipc import connection
from tests.leftovers import needs_descriptors
from tests.limits import HANG
from tests.methods import METHODS
from tests.process_workers import KINDS, Child, call, client_of, clients_of, is_asking, outcome, use
from tests.transports import process_slots, slots

MAKES: list[Any] = [process_slots, MPTransport]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def raises_closed(client: Any) -> bool:
    with pytest.raises(ClientClosedError):
        call(client, request(1))

    async def submit() -> None:
        client.submit(request(1))

    with pytest.raises(ClientClosedError):
        asyncio.run(submit())
    return True


@needs_descriptors
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_what_a_client_had_is_gone_when_it_is_closed_without_a_garbage_collection(make: Any, kind: str) -> None:
    with InferenceServer(double, make()) as server, no_garbage_collection():
        address = server.transport.address  # type: ignore[attr-defined]
        outcome(client_of(server.transport, kind), 1)

        def use_and_close() -> None:
            remote = connect(address, timeout=HANG)
            client = client_of(remote, kind)
            assert outcome(client, 2) == 4
            client.close()
            client.close()
            assert raises_closed(client)

        use_and_close()
        eventually(lambda: len(server.transport.connections.connections) <= 1)  # type: ignore[attr-defined]
        before = descriptors()
        for _ in range(5):
            use_and_close()
        eventually(lambda: descriptors() <= before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slot_of_a_closed_client_is_free_for_another_at_once(kind: str) -> None:
    transport = slots(2)
    with InferenceServer(double, transport):
        for value in range(10):
            used, unused = client_of(transport, kind), client_of(transport, kind)
            assert outcome(used, value) == 2 * value
            with pytest.raises(NoFreeSlotError, match="0 of 2 slots are free, 1 were asked for; close a client"):
                transport.client()
            used.close()
            unused.close()


@pytest.mark.parametrize("given_up", [False, True], ids=["asked", "given up"])
def test_the_slot_of_a_client_that_is_closed_while_the_model_is_busy_is_free_at_once(given_up: bool) -> None:
    transport = slots(1)
    model = GatedModel()
    with InferenceServer(model, transport):
        for _ in range(3):
            client = transport.client()
            future = client.submit(request(1))
            assert model.entered.wait(HANG)
            if given_up:
                future.cancel()
            client.close()
        model.open()


def test_a_slot_is_free_at_once_where_another_thread_writes_to_it_just_then(monkeypatch: pytest.MonkeyPatch) -> None:
    writing, here = threading.Event(), threading.get_ident()
    transport = slots(1)
    codec = type(transport.client_codec())
    load = codec.encode

    def slowly(*args: Any) -> bytes:
        if threading.get_ident() != here:
            writing.set()
            time.sleep(0.1)
        return load(*args)

    monkeypatch.setattr(codec, "encode", slowly)
    monkeypatch.setattr(connection, "ENCODING_LIMIT", HANG)  # the other thread may be kept from running, too
    with InferenceServer(double, transport):
        client = transport.client()
        client.submit(request(1))  # by the thread for futures, as the server has not taken this process in yet
        assert writing.wait(HANG)
        client.close()
        assert is_double(transport.client()(request(2), HANG), 2)


def test_a_client_that_nobody_used_gives_its_slot_back_also_where_no_server_has_started() -> None:
    transport = slots(1)
    for _ in range(3):
        transport.client().close()
    kept = transport.client()
    with InferenceServer(double, transport):
        assert is_double(kept(request(1), HANG), 1)


def close_unused(line: Any, client: Any) -> None:
    client.close()
    line.send("closed")


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_was_closed_unused_in_another_process_gives_its_slot_back(method: str) -> None:
    transport = slots(1)
    with InferenceServer(double, transport), Child(method, close_unused, transport.client()) as child:
        assert child.hear() == "closed"
        assert outcome(transport.client(), 3) == 6


def test_a_client_that_is_closed_where_it_was_made_leaves_the_one_that_uses_it_alone() -> None:
    transport = slots(2)
    with InferenceServer(double, transport):
        client = transport.client()
        with Child("fork", use, client) as child:
            assert child.tell(1) == 2
            client.close()
            for value in range(5):
                assert child.tell(value) == 2 * value
            assert transport.callers() == 1


@pytest.mark.parametrize("make", MAKES)
def test_a_connection_is_closed_with_the_last_of_its_clients(make: Any) -> None:
    transport = make()
    with InferenceServer(double, transport):
        first, second, third = clients_of(transport, 3, blocking=True)
        assert outcome(first, 1) == 2
        first.close()
        assert raises_closed(first)
        assert outcome(second, 2) == 4
        del third
        gc.collect()
        assert len(transport.connections.connections) == 1
        second.close()
        eventually(lambda: not transport.connections.connections)


@pytest.mark.parametrize("timeout", [None, HANG])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("make", MAKES)
def test_a_call_under_way_ends_with_the_error_of_its_closed_client(
    make: Any, count: int, timeout: float | None
) -> None:
    model, transport = GatedModel(), make()
    with InferenceServer(model, transport) as server, ThreadPoolExecutor(2) as threads:
        clients = clients_of(transport, count, blocking=True)
        try:
            held = threads.submit(clients[0], request(1), timeout)
            assert model.entered.wait(HANG)
            others = [threads.submit(client, request(2), HANG) for client in clients[1:]]
            eventually(lambda: server.stats().pending == count - 1)
            clients[0].close()
            assert isinstance(held.exception(HANG / 4), ClientClosedError)
        finally:
            model.open()
        for other in others:
            assert is_double(other.result(HANG), 2)


@pytest.mark.parametrize("make", MAKES)
def test_futures_under_way_end_with_the_error_of_their_closed_client(make: Any) -> None:
    model, transport = GatedModel(), make()
    with InferenceServer(model, transport):
        client = transport.client()
        try:
            future = client.submit(request(1))
            assert model.entered.wait(HANG)
            client.close()
            assert isinstance(future.exception(HANG / 4), ClientClosedError)
        finally:
            model.open()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("make", MAKES)
async def test_tasks_under_way_end_with_the_error_of_their_closed_client(make: Any, count: int) -> None:
    model, transport = GatedModel(), make()
    async with InferenceServer(model, transport):
        clients = transport.async_clients(count)
        try:
            held = asyncio.ensure_future(clients[0](request(1)))
            assert await asyncio.to_thread(model.entered.wait, HANG)
            closing = threading.Thread(target=clients[0].close)  # of another thread than the loop's
            closing.start()
            with pytest.raises(ClientClosedError):
                async with asyncio.timeout(HANG / 4):
                    await held
            await asyncio.to_thread(closing.join)
        finally:
            model.open()
        for client in clients[1:]:
            assert is_double(await client(request(2)), 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_requests_that_wait_for_a_server_that_never_starts_end_when_their_client_is_closed(
    make: Any, kind: str
) -> None:
    transport = make()
    (client,) = clients_of(transport, 1, blocking=kind == "blocking")
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(call, client, request(1))
        eventually(lambda: is_asking(client))
        client.close()
        assert isinstance(held.exception(HANG / 4), ClientClosedError)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
async def test_clients_and_connections_are_context_managers(make: Any, kind: str) -> None:
    transport = make()
    async with InferenceServer(double, transport):
        remote = await asyncio.to_thread(connect, transport.address, timeout=HANG)
        async with remote:
            client = client_of(remote, kind)
            assert await asyncio.to_thread(outcome, client, 1) == 2
        assert await asyncio.to_thread(raises_closed, client)
        with pytest.raises(ClientClosedError, match="connect again"):
            client_of(remote, kind)
        client = client_of(transport, kind)
        if isinstance(client, AsyncInferenceClient):
            async with client:
                assert is_double(await client(request(2)), 2)
        else:
            with client:
                assert await asyncio.to_thread(outcome, client, 2) == 4
        assert await asyncio.to_thread(raises_closed, client)
        with await asyncio.to_thread(connect, transport.address, timeout=HANG) as other:
            assert await asyncio.to_thread(outcome, client_of(other, kind), 3) == 6


def test_a_view_of_a_reply_outlives_the_close_of_its_client() -> None:
    transport = process_slots()
    with InferenceServer(double, transport):
        with transport.client(copy=False) as client:
            reply = client(request(3), HANG)
        gc.collect()
        assert is_double(reply, 3)


@pytest.mark.parametrize("make", MAKES)
def test_a_closed_client_travels_as_a_closed_one_and_a_connection_as_an_open_one(make: Any) -> None:
    transport = make()
    with InferenceServer(double, transport):
        client = transport.client()
        client.close()
        assert raises_closed(pickle.loads(pickle.dumps(client)))
        with connect(transport.address, timeout=HANG) as remote, pickle.loads(pickle.dumps(remote)) as other:
            assert outcome(other.client(), 1) == 2


@pytest.mark.parametrize("make", MAKES)
def test_clients_that_are_closed_while_they_are_used_disturb_nobody(make: Any) -> None:
    """From other threads, at any moment; whoever has another connection goes on."""
    transport = make()
    with InferenceServer(double, transport), ThreadPoolExecutor(4) as threads:
        stays = transport.client()

        def ask(client: Any) -> int:
            value = 0
            while True:
                value += 1
                try:
                    assert is_double(client(request(value), HANG), value)
                except ClientClosedError:
                    return value

        for turn in range(30):
            clients = transport.clients(2)
            asking = [threads.submit(ask, client) for client in clients]
            assert is_double(stays(request(turn), HANG), turn)
            for client in clients:
                threads.submit(client.close).result(HANG)
            for one in asking:
                one.result(HANG)
        stays.close()
        eventually(lambda: not transport.connections.connections)
