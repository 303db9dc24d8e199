"""Moments between two steps of a connection in which something else happens: nobody may lose an answer by it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from tensordict import TensorDictBase

from aioinfer import (
    ClientClosedError,
    InferenceServer,
    MPTransport,
    NoFreeSlotError,
    PeerDiedError,
    ServerClosedError,
)
from aioinfer.ipc import sockets as sockets_module
from aioinfer.ipc.sockets import FramedSocket, connect_unix, frame, header
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import connection_of, ignore_in_wait
from aioinfer.transports.ipc import connection as connection_module
from aioinfer.transports.ipc import slots as slots_module
from aioinfer.transports.ipc.connection import ClientConnection, FutureReader, LoopReader, PendingCalls
from aioinfer.transports.ipc.protocol import FromClient, FromServer
from aioinfer.transports.remote import RemoteServer
from tests.limits import HANG
from tests.process_workers import greeting
from tests.stepped import Steps
from tests.transports import slots

BIG = 1_000_000  # floats: 20 sockets full
SOON = HANG / 4
MOMENT = 0.2
MANY = 120  # processes: each took a dozen frames of Python's stack


def is_read(client: Any) -> bool:
    connection = connection_of(client)
    return connection is not None and connection.has_reader


def is_accepted(client: Any) -> bool:
    connection = connection_of(client)
    return connection is not None and connection.status is not None


def futures_are_read_for() -> bool:
    return any(thread.name == "aioinfer-replies" for thread in threading.enumerate())


# -- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["hung up", "closed", "closed while it connects"])
def test_every_future_of_a_connection_that_ends_is_settled_though_their_thread_looks_between_two_of_them(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures: list[Any] = []
    fail = FutureReader.set_exceptions

    def fail_and_wait(reader: FutureReader, receivers: Sequence[Any], errors: Sequence[Exception]) -> None:
        fail(reader, receivers, errors)
        if threading.current_thread().name != "aioinfer-replies":
            eventually(lambda: all(future.done() for future in futures) or not futures_are_read_for())

    monkeypatch.setattr(FutureReader, "set_exceptions", fail_and_wait)
    if end == "closed while it connects":
        monkeypatch.setattr(connection_module, "try_connect", lambda *_: False)
    transport, model = MPTransport(), GatedModel()
    with InferenceServer(model, transport), ThreadPoolExecutor(1) as threads:
        client: Any = transport.client()
        held = threads.submit(client, request(1), HANG)
        try:
            eventually(lambda: is_read(client))
            futures += [client.submit(request(2)) for _ in range(3)]
            if end == "hung up":
                assert model.entered.wait(HANG)
                for connection in list(transport.connections.connections):
                    transport.connections.disconnect(connection)
            else:
                client.close()
            error = PeerDiedError if end == "hung up" else ClientClosedError
            assert [type(future.exception(SOON)) for future in [held, *futures]] == [error] * 4
        finally:
            model.open()


def test_a_future_is_settled_though_its_reply_is_handed_on_after_their_thread_has_seen_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deliver = FutureReader.set_results

    def close_and_deliver(*args: Any) -> None:
        if threading.current_thread().name != "aioinfer-replies":
            client.close()
            eventually(lambda: not futures_are_read_for())
        deliver(*args)

    monkeypatch.setattr(FutureReader, "set_results", close_and_deliver)
    transport, model = MPTransport(), GatedModel()
    with InferenceServer(model, transport) as server, ThreadPoolExecutor(2) as threads:
        first = threads.submit(transport.client(), request(0), HANG)
        assert model.entered.wait(HANG)
        client: Any = transport.client()
        held = threads.submit(client, request(1), HANG)
        eventually(lambda: is_read(client))
        future = client.submit(request(2))
        eventually(lambda: server.stats().pending == 2)
        model.open()
        assert is_double(first.result(HANG), 0)
        assert is_double(held.result(HANG), 1)
        assert is_double(future.result(SOON), 2)


def test_a_request_that_is_sent_as_the_server_ends_is_told_so_though_its_process_was_taken_in_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = MPTransport()
    codec = type(transport.client_codec())
    encode = codec.encode

    def encode_when_it_has_ended(*args: Any) -> bytes:
        monkeypatch.setattr(codec, "encode", encode)
        assert is_double(other(request(2), HANG), 2)
        server.shutdown()
        return encode(*args)

    with InferenceServer(double, transport) as server:
        client, other = transport.clients(2)
        monkeypatch.setattr(codec, "encode", encode_when_it_has_ended)
        with pytest.raises(ServerClosedError):
            client(request(1), SOON)


def test_a_client_is_closed_while_its_process_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    peek, shutdown = FramedSocket.peek_descriptors, FramedSocket.shutdown
    arrived, closing = threading.Event(), threading.Event()

    def peek_and_wait(*args: Any) -> Any:
        frames, rest = peek(*args)
        if frames:
            arrived.set()
            assert closing.wait(HANG)
        return frames, rest

    def let_it_be_read_and_shut_down(wire: FramedSocket) -> None:
        if threading.current_thread() is threading.main_thread():
            closing.set()
            assert isinstance(held.exception(HANG), ClientClosedError)
        shutdown(wire)

    monkeypatch.setattr(FramedSocket, "peek_descriptors", peek_and_wait)
    monkeypatch.setattr(FramedSocket, "shutdown", let_it_be_read_and_shut_down)
    transport = MPTransport()
    with InferenceServer(double, transport), ThreadPoolExecutor(1) as threads:
        client: Any = transport.client()
        held = threads.submit(client, request(1), HANG)
        assert arrived.wait(HANG)
        client.close()


def test_what_came_with_descriptors_is_read_again_as_other_things_are() -> None:
    ours, theirs = map(FramedSocket, socket.socketpair())
    theirs.send_descriptors(frame(header(FromServer.HELLO_ACK), b"news"), [theirs.fileno()])
    descriptors: dict[int, None] = {}
    frames, rest = ours.peek_descriptors(descriptors)
    try:
        assert frames == [(header(FromServer.HELLO_ACK), b"news")]
        assert ours.peek() == ((), frames, rest)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# -- slots ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["reply", "error"])
def test_a_slots_next_request_does_not_get_what_was_meant_for_the_one_before(
    outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = slots_module.SlotRequest
    under_way: Any = entry.__dict__["under_way"]
    once: list[Callable[[], None]] = []
    read, complete = threading.Event(), PendingCalls.complete

    def complete_and_say_so(*args: Any) -> None:
        complete(*args)
        read.set()

    def set_under_way(self: Any, value: bool) -> None:
        under_way.__set__(self, value)
        if once and not value:
            once.pop()()

    def model(td: TensorDictBase) -> TensorDictBase:
        assert not replies or read.wait(HANG)  # the next one is computed when what was sent before is read
        if outcome == "error" and bool((td["observation"] == 1).any()):
            raise ValueError("this one can't be computed")
        return double(td)

    def ask_another_thing() -> None:
        read.clear()
        first.cancel()
        replies.append(client.submit(request(5)))
        transport.queue.pending()  # it is read

    monkeypatch.setattr(PendingCalls, "complete", complete_and_say_so)
    monkeypatch.setattr(entry, "under_way", property(under_way.__get__, set_under_way))
    transport, gated = slots(1), GatedModel(model)
    replies: list[Any] = []
    with InferenceServer(gated, transport):
        client = transport.client()
        first = client.submit(request(1))
        try:
            assert gated.entered.wait(HANG)
            once.append(ask_another_thing)
        finally:
            gated.open()
        eventually(lambda: bool(replies))
        assert is_double(replies[0].result(HANG), 5)
        client.close()


async def test_many_processes_that_dial_at_once_find_the_slots_that_are_theirs() -> None:
    transport = slots(MANY)
    clients = [transport.async_client() for _ in range(MANY)]
    calls = [asyncio.ensure_future(client(request(value), HANG)) for value, client in enumerate(clients)]
    await asyncio.sleep(0)
    async with InferenceServer(double, transport):
        for value, reply in enumerate(await asyncio.gather(*calls)):
            assert is_double(reply, value)
        for client in clients:
            client.close()


async def test_many_processes_that_dial_at_once_are_told_if_no_slot_is_free() -> None:
    transport = slots(1)
    holder = transport.async_client()
    async with RemoteServer(transport.endpoint()) as remote:
        calls = [asyncio.ensure_future(remote.async_client()(request(1), HANG)) for _ in range(MANY)]
        await asyncio.sleep(0)
        async with InferenceServer(double, transport):
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(error) for error in errors} == {NoFreeSlotError}
            assert is_double(await holder(request(2), HANG), 2)


def test_what_a_process_says_after_it_joins_waits_while_the_server_looks_for_its_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = slots(1)
    hello, cancel = greeting(transport), header(FromClient.CANCEL).to_bytes(8, sys.byteorder)
    monkeypatch.setattr(sockets_module, "BUFFER_BYTES", len(hello))  # so it is not read together
    with connect_unix(transport.address) as gone:
        gone.sendall(hello)
        transport.read()
        assert transport.callers() == 1
    with connect_unix(transport.address) as sock:
        sock.sendall(hello + cancel)
        transport.read()
        assert transport.callers() == 1


# -- what waits for room -------------------------------------------------------------------------------------


def test_what_is_kept_as_a_line_was_flushed_by_another_thread_leaves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = MPTransport()
    piece = bytes(1 << 20)
    received = 0

    def unsent(wire: FramedSocket) -> bool:
        something = bool(wire.outbox)
        if received and not something and another.ident is None:
            another.start()
            another.join(MOMENT)  # it may have to wait for this thread
        return something

    def everything_has_come() -> bool:
        nonlocal received
        transport.read()
        try:
            received += len(sock.recv(1 << 18))
        except BlockingIOError:
            pass
        return received == 2 * len(piece)

    with connect_unix(transport.address) as sock:
        sock.sendall(greeting(transport))
        transport.read()
        sock.settimeout(HANG)
        assert sock.recv(1 << 16)
        (line,) = transport.connections.connections
        another = threading.Thread(target=line.send, args=(piece,))
        monkeypatch.setattr(FramedSocket, "unsent", property(unsent))
        line.send(piece)
        sock.setblocking(False)
        eventually(everything_has_come, within=SOON)


@pytest.mark.parametrize("timeout", [None, HANG])
def test_a_call_whose_request_is_half_sent_ends_when_its_client_is_closed(timeout: float | None) -> None:
    transport, model = MPTransport(), GatedModel()
    with InferenceServer(model, transport), ThreadPoolExecutor(2) as threads:
        client, other = transport.clients(2)
        first = threads.submit(transport.client(), request(1), HANG)
        try:
            assert model.entered.wait(HANG)
            held = threads.submit(client, request(2, size=BIG), timeout)
            eventually(lambda: is_accepted(client))
            connection = connection_of(client)
            assert connection is not None
            assert connection.unsent
            client.close()
            assert isinstance(held.exception(SOON), ClientClosedError)
        finally:
            model.open()
        assert is_double(first.result(HANG), 1)
        assert is_double(other(request(3), HANG), 3)


def test_a_future_is_settled_while_a_large_request_of_its_connection_is_half_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport, model, wait = MPTransport(), Steps(), ClientConnection.wait
    asked = threading.Event()

    def wait_when_all_is_asked(*args: Any) -> None:
        assert asked.wait(HANG)
        wait(*args)

    monkeypatch.setattr(ClientConnection, "wait", wait_when_all_is_asked)
    with InferenceServer(model, transport, max_batch_size=1), model.closed():
        client, other = transport.clients(2)
        with client, other, transport.client() as third:
            small = client.submit(request(1))
            assert model.entered.acquire(timeout=HANG)
            large = other.submit(request(2, size=BIG))
            next_one = third.submit(request(3))
            asked.set()
            model.go.release()
            assert model.entered.acquire(timeout=HANG)
            assert is_double(small.result(SOON), 1)
            model.go.release(2)
            assert is_double(next_one.result(HANG), 3)
            assert is_double(large.result(HANG), 2)


async def test_a_large_request_leaves_though_its_event_loop_reads_only_after_it_has_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport, model, attach = MPTransport(), GatedModel(), LoopReader.attach
    late: list[LoopReader] = []
    async with InferenceServer(model, transport), asyncio.timeout(SOON):
        first = asyncio.ensure_future(transport.async_client()(request(0)))
        try:
            assert await asyncio.to_thread(model.entered.wait, SOON)
            monkeypatch.setattr(LoopReader, "attach", lambda reader: late.append(reader))
            client: Any = transport.async_client()
            reply = asyncio.ensure_future(client(request(1, size=BIG)))
            await asyncio.sleep(0)
            connection = connection_of(client)
            assert connection is not None
            while connection.status is None:
                await asyncio.sleep(0.001)
                connection.receive()  # as another event loop does
            assert connection.unsent
            for reader in late:
                attach(reader)
        finally:
            model.open()
        assert is_double(await first, 0)
        assert is_double(await reply, 1)


# -- wake-ups ------------------------------------------------------------------------------------------------


def look_for_a_slot(transport: Any) -> None:
    with pytest.raises(NoFreeSlotError):
        transport.client()


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "one of two"])
@pytest.mark.parametrize(
    ("make", "read"),
    [
        (MPTransport, lambda transport: transport.queue.pending()),
        (MPTransport, lambda transport: transport.read()),
        (partial(slots, 1), lambda transport: transport.queue.pending()),
        (partial(slots, 1), look_for_a_slot),
    ],
    ids=["asked how many are pending", "reading all", "slots: asked how many are pending", "looking for a slot"],
)
def test_who_reads_a_request_before_the_model_thread_has_woken_up_wakes_it(
    make: Callable[[], Any], read: Callable[[Any], object], joined: bool
) -> None:
    transport = make()
    with InferenceServer(double, [transport, MPTransport()] if joined else transport):
        client = transport.client()
        assert is_double(client(request(1), HANG), 1)
        (connection,) = transport.connections.connections
        # A thread that sleeps in `select` does not hear of what was read before it runs. This one never does.
        ignore_in_wait(transport.connections.selector, connection.socket)
        future = client.submit(request(2))
        read(transport)
        assert is_double(future.result(HANG), 2)
