"""What clients are told when the server does not take a request, and what a transport says of itself."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import (
    ClientBusyError,
    InferenceServer,
    MPTransport,
    NoFreeSlotError,
    PeerDiedError,
    ProcessSlotTransport,
    ServerClosedError,
    ServerOverloadedError,
    ServerPausedError,
    connect,
)
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from tests.ipc.test_modes import make_model
from tests.limits import HANG
from tests.process_workers import KINDS, Child, call, client_of, clients_of
from tests.transports import process_slots

MAKES: list[Any] = [process_slots, MPTransport]


def refusal(client: Any, kind: str) -> BaseException | None:
    """What the future of a request that is submitted now fails with; ``submit`` must not raise."""
    if kind == "blocking":
        future: Future[Any] = client.submit(request(1))
        return future.exception(HANG)

    async def submit() -> BaseException | None:
        submitted = client.submit(request(1))
        await asyncio.wait([submitted], timeout=HANG)
        error: BaseException | None = submitted.exception()
        return error

    return asyncio.run(submit())


def refused(error: type[Exception], client: Any, kind: str) -> None:
    assert type(refusal(client, kind)) is error
    with pytest.raises(error):
        call(client, request(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_a_refusal_comes_through_the_future_whatever_it_is(make: Any, kind: str) -> None:
    transport = make()
    server = InferenceServer(double, transport)
    used, unused = client_of(transport, kind), client_of(transport, kind)
    with server:
        assert is_double(call(used, request(1)), 1)
        with server.paused("reject"):
            refused(ServerPausedError, used, kind)
            refused(ServerPausedError, unused, kind)
        assert is_double(call(used, request(2)), 2)
    refused(ServerClosedError, used, kind)
    refused(ServerClosedError, client_of(transport, kind), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_a_full_queue_is_told_through_the_future(make: Any, kind: str) -> None:
    model, transport = GatedModel(), make()
    with InferenceServer(model, transport, max_pending=1) as server:
        try:
            held = [transport.client().submit(request(1))]
            assert model.entered.wait(HANG)
            held.append(transport.client().submit(request(2)))
            eventually(lambda: server.stats().pending == 1)
            refused(ServerOverloadedError, client_of(transport, kind), kind)
        finally:
            model.open()
        assert [int(future.result(HANG)["action"][0]) for future in held] == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_for_which_no_slot_is_left_is_told_so_through_the_future(kind: str) -> None:
    transport = ProcessSlotTransport(request(0), double(request(0)), num_slots=1)
    with InferenceServer(double, transport), transport.client() as holder:
        with pytest.raises(NoFreeSlotError, match="0 of 1 slots are free, 1 were asked for; close a client"):
            transport.client()
        assert is_double(holder(request(1), HANG), 1)
        with connect(transport.address, timeout=HANG) as remote:
            client = client_of(remote, kind)
            refused(NoFreeSlotError, client, kind)
            holder.close()
            assert is_double(call(client, request(2)), 2)  # the same client, once there is a slot


def serve_until_killed(line: Any, transport: Any) -> None:
    with InferenceServer(double, transport.take()):
        line.send("serves")
        threading.Event().wait()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_the_death_of_the_server_is_told_through_the_future(make: Any, kind: str) -> None:
    transport = make()
    given = transport.hand_off()
    client = client_of(transport, kind)
    with Child("fork", serve_until_killed, given) as child:
        given.close()
        assert child.hear() == "serves"
        assert is_double(call(client, request(1)), 1)
        child.kill()
        for _ in range(2):
            assert type(refusal(client, kind)) is PeerDiedError


def test_a_transport_that_was_given_away_to_a_process_that_never_starts_leaves_nobody_waiting() -> None:
    transport = process_slots()
    client = transport.client()
    given = transport.hand_off()
    given.close()
    given.close()
    with pytest.raises(ServerClosedError, match="no server listens"):
        client(request(1), HANG)


@pytest.mark.parametrize("make", MAKES)
async def test_tasks_may_give_a_deadline_as_threads_do(make: Any) -> None:
    model, transport = GatedModel(), make()
    async with InferenceServer(model, transport):
        client = transport.async_client()
        try:
            with pytest.raises(TimeoutError):
                await client(request(1), 0.05)
        finally:
            model.open()
        assert is_double(await client(request(2), timeout=HANG), 2)


# -- two threads on one client -----------------------------------------------------------------------------


@contextmanager
def threads_on_one_client(transport: Any, count: int) -> Iterator[list[int]]:
    client, end = transport.client(), threading.Event()
    told = [0, 0]  # replies, and how often the client was busy

    def ask(index: int) -> None:
        value = 0
        while not end.is_set():
            value += 1
            number = 10_000 * index + value % 5000
            try:
                reply = client(request(number), HANG / 2)
            except ClientBusyError:
                told[1] += 1
            else:
                assert is_double(reply, number)
                told[0] += 1

    with ThreadPoolExecutor(count) as threads:
        asking = [threads.submit(ask, index) for index in range(count)]
        try:
            yield told
        finally:
            end.set()
            for one in asking:
                one.result(HANG)


def test_threads_that_share_a_client_of_a_slot_get_their_own_replies_or_are_told_that_it_is_busy() -> None:
    transport = process_slots()
    with InferenceServer(double, transport), threads_on_one_client(transport, 3) as told:
        eventually(lambda: told[0] > 2000 and told[1] > 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_of_a_slot_says_that_it_is_busy_until_its_future_is_done(kind: str) -> None:
    model, transport = GatedModel(), process_slots()

    async def submit_twice() -> None:
        client = client_of(transport, "awaiting")
        first = client.submit(request(1))
        with pytest.raises(ClientBusyError, match="make a client for each caller"):
            client.submit(request(2))
        with pytest.raises(ClientBusyError):
            await client(request(2))
        first.cancel()
        second = client.submit(request(3))
        model.open()
        assert is_double(await second, 3)

    with InferenceServer(model, transport):
        if kind == "awaiting":
            asyncio.run(submit_twice())
            return
        client = client_of(transport, kind)
        first = client.submit(request(1))
        with pytest.raises(ClientBusyError, match="make a client for each caller"):
            client.submit(request(2))
        first.cancel()
        second = client.submit(request(3))
        model.open()
        assert is_double(second.result(HANG), 3)


# -- what the transport says of itself ---------------------------------------------------------------------


def test_the_number_of_callers_can_be_asked_for_while_clients_are_made() -> None:
    transport = ProcessSlotTransport(request(0), double(request(0)), num_slots=20_000)
    end = threading.Event()
    faults: list[BaseException] = []

    def ask() -> None:
        while not end.is_set():
            try:
                assert transport.callers() == 0
            except BaseException as error:
                faults.append(error)
                return

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        clients = [transport.client() for _ in range(3000)]
    finally:
        end.set()
        asking.join()
    assert not faults
    clients[0].close()
    eventually(lambda: transport.queue.pending() == 0 and not transport.connections.connections)
    assert transport.callers() == 0


def test_waiting_for_work_ends_when_a_request_is_there_or_the_time_is_over() -> None:
    transport = process_slots()
    InferenceServer(double, transport)
    transport.client().close()  # somebody comes, who asks for nothing
    began = time.monotonic()
    transport.wait_for_work(0.3)
    assert time.monotonic() - began >= 0.3
    client = transport.client()
    future = client.submit(request(1))
    transport.wait_for_work(HANG)
    inputs, callbacks = transport.drain(4)
    assert [float(td["observation"][0]) for td in inputs] == [1.0]
    transport.resolve(callbacks[0], double(inputs[0]))
    assert is_double(future.result(HANG), 1)


def test_a_response_spec_may_have_the_version_of_the_policy() -> None:
    spec = TensorDict({"action": torch.zeros(3), "policy_version": torch.zeros((), dtype=torch.int32)})
    transport = ProcessSlotTransport(request(0), spec, num_slots=14)
    early = transport.client()  # knows nothing of what the server adds
    with InferenceServer(make_model(), transport) as server:
        many = transport.clients(10)
        copied, lent, remote = (
            transport.client(),
            transport.client(copy=False),
            connect(transport.address, timeout=HANG).client(),
        )
        for version in range(3):
            for client in (early, copied, lent, remote):
                reply = client(request(2), HANG)
                assert is_double(reply, 2)
                assert int(reply["policy_version"]) == version
                assert set(reply.keys()) == {"action", "policy_version"}
            replies = [client.submit(request(3)) for client in many]
            assert {int(reply.result(HANG)["policy_version"]) for reply in replies} == {version}
            server.update_weights(make_model())


def versioned(td: TensorDictBase) -> TensorDictBase:
    action = double(td)["action"]
    return TensorDict({"action": action, "policy_version": torch.full(td.batch_size, 7)}, td.batch_size)


@pytest.mark.parametrize("key", [None, "other"])
def test_an_entry_of_that_name_is_the_models_where_the_server_adds_none(key: str | None) -> None:
    spec = TensorDict({"action": torch.zeros(3), "policy_version": torch.zeros((), dtype=torch.int64)})
    transport = ProcessSlotTransport(request(0), spec, num_slots=4)
    for _ in range(2):
        with InferenceServer(versioned, transport, policy_version_key=key):
            reply = transport.client()(request(1), HANG)
            assert int(reply["policy_version"]) == 7
        with InferenceServer(double, transport):
            assert int(transport.client()(request(1), HANG)["policy_version"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_transport_between_processes_takes_the_same_options_for_its_clients(kind: str) -> None:
    for make in MAKES:
        transport = make()
        with InferenceServer(double, transport):
            assert is_double(call(client_of(transport, kind, copy=False), request(1)), 1)
            many = transport.clients(2, copy=False) if kind == "blocking" else transport.async_clients(2, copy=True)
            for client in many:
                assert is_double(call(client, request(2)), 2)
    assert len(clients_of(MPTransport(), 3, blocking=True)) == 3
