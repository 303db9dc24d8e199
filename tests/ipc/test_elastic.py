"""Workers that come and go: slots that are taken and given back, and clients that find their server."""

from __future__ import annotations

import asyncio
import gc
import pickle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from aioinfer import InferenceServer, InvalidRequestError, MPTransport, NoFreeSlotError, ProcessSlotTransport, connect
from aioinfer.testing import GatedModel, double, eventually, request
from tests.limits import HANG
from tests.methods import METHODS
from tests.process_workers import KINDS, Child, call, client_of, outcome, use
from tests.transports import process_slots, slots

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: of a process that has threads

Transport = MPTransport | ProcessSlotTransport


def refusal(free: int, count: int, asked: int) -> str:
    found = f"{free} of {count} slots are free, {asked} were asked for"
    return f"{found}; close a client, or make a ProcessSlotTransport with more slots"


# -- by the address ----------------------------------------------------------------------------------------


def look_for(line: Connection[Any, Any], address: str) -> None:
    """Connect anew, and call a client of each kind, whenever told to."""
    while line.recv():
        try:
            remote = connect(address, timeout=HANG)
        except Exception as error:
            line.send(f"{type(error).__name__}: {error}")
        else:
            line.send([outcome(client_of(remote, kind), 4.0) for kind in KINDS])


@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_workers_that_started_before_the_server_or_after_it_find_it_by_its_address(make: Any, tmp_path: Path) -> None:
    address = str(tmp_path / "server")
    with Child("fork", look_for, address) as early:
        assert early.tell("look").startswith(f"ServerClosedError: no server listens at {address}")
        transport = slots(4, address) if make is process_slots else MPTransport(address=address)
        assert transport.address == address
        for _ in range(2):
            with InferenceServer(double, transport), Child("forkserver", look_for, address) as late:
                assert early.tell("look") == late.tell("look") == [8.0, 8.0]
            assert "no server listens" in early.tell("look")
    assert not Path(address).exists()


def test_connecting_ends_with_its_deadline_where_the_server_has_not_started() -> None:
    transport = slots(1)
    server = InferenceServer(double, transport)
    with pytest.raises(TimeoutError, match=r"does not answer within 0\.05 seconds"):
        connect(transport.address, timeout=0.05)
    with server:
        assert outcome(connect(transport.address, timeout=HANG).client(), 1) == 2


def test_an_address_is_listened_at_by_one_transport_only(tmp_path: Path) -> None:
    address = str(tmp_path / "server")
    transport = MPTransport(address=address)
    with pytest.raises(OSError, match="in use"):
        MPTransport(address=address)
    with InferenceServer(double, transport):
        assert outcome(connect(address, timeout=HANG).client(), 1) == 2


# -- too many ----------------------------------------------------------------------------------------------


def test_more_clients_than_slots_are_refused_and_the_message_names_the_numbers() -> None:
    transport = slots(3)
    first = transport.client()
    with pytest.raises(NoFreeSlotError, match=refusal(2, 3, 3)):
        transport.clients(3)
    rest = transport.async_clients(2)
    with pytest.raises(NoFreeSlotError, match=refusal(0, 3, 1)):
        transport.client()
    with InferenceServer(double, transport):
        assert [outcome(client, 1) for client in (first, *rest)] == [2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_clients_of_a_remote_are_refused_when_used_if_too_few_slots_are_free(kind: str) -> None:
    transport = slots(2)
    with InferenceServer(double, transport):
        remote = connect(transport.address, timeout=HANG)
        one, other, third = (client_of(remote, kind) for _ in range(3))
        assert [outcome(client, 1) for client in (one, other)] == [2, 2]
        for _ in range(2):
            assert outcome(third, 1) == f"NoFreeSlotError: {refusal(0, 2, 1)}"
        assert [outcome(client, 2) for client in (one, other)] == [4, 4]
        del one
        eventually(lambda: transport.callers() == 1)
        assert outcome(third, 1) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_more_clients_of_a_remote_than_there_are_slots_at_all_are_refused_likewise(kind: str) -> None:
    with InferenceServer(double, slots(2)) as server:
        assert isinstance(server.transport, ProcessSlotTransport)
        remote = connect(server.transport.address, timeout=HANG)
        clients = remote.clients(3) if kind == "blocking" else remote.async_clients(3)
        assert outcome(clients[0], 1) == f"NoFreeSlotError: {refusal(2, 2, 3)}"


@pytest.mark.parametrize("count", [0, -1, True, 1.5, None])
@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_a_number_of_clients_is_a_positive_integer(make: Any, count: Any) -> None:
    transport = make()
    with InferenceServer(double, transport):
        for source in (transport, connect(transport.address, timeout=HANG)):
            for method in (source.clients, source.async_clients):
                with pytest.raises(ValueError, match="an integer of at least 1"):
                    method(count)


# -- slots that come back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["return", "exit", "_exit", "kill", "drop"])
def test_a_slot_is_free_again_when_its_process_ends_or_drops_the_client(end: str, kind: str) -> None:
    transport = slots(2)
    with InferenceServer(double, transport):
        other = transport.client()
        assert outcome(other, 1) == 2
        for value in range(3):  # the second and third one could not have a slot if the one before had not left it
            with Child("fork", use, pickle.dumps(client_of(transport, kind))) as worker:
                assert worker.tell(value) == 2 * value
                assert transport.callers() == 2
                if end == "kill":
                    worker.kill()
                elif end == "drop":
                    assert worker.tell("drop") == "dropped"
                else:
                    worker.line.send(end)
                    worker.process.join(HANG)
                eventually(lambda: transport.callers() == 1)
        assert outcome(other, 5) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_is_free_again_when_a_client_is_dropped_in_the_servers_process(kind: str) -> None:
    transport = slots(1)
    with InferenceServer(double, transport):
        for value in range(20):
            client = client_of(transport, kind)
            assert outcome(client, value) == 2 * value
            del client  # the next one has the slot at once: the server looks before it refuses


@pytest.mark.parametrize("ending", ["answered", "given up in its forward pass", "given up before it left"])
async def test_a_slot_is_free_again_when_an_event_loop_drops_a_client_however_its_last_call_ended(ending: str) -> None:
    model = GatedModel()
    transport = slots(1)
    with InferenceServer(model, transport):
        for value in range(3):
            client = transport.async_client()
            call = asyncio.create_task(client(request(value)))
            await asyncio.sleep(0)
            if ending == "answered":
                model.open()
                await call
            else:
                if ending == "given up in its forward pass":
                    await asyncio.to_thread(model.entered.wait, HANG)
                    model.entered.clear()
                call.cancel()
                await asyncio.wait([call])
                model.open()
            del client, call
            await asyncio.to_thread(eventually, lambda: transport.free_slots == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_raises_leaves_its_slot(kind: str) -> None:
    transport = slots(1)
    with InferenceServer(double, transport):
        pickled = pickle.dumps(client_of(transport, kind))
        for value in range(3):
            with Child("fork", use, pickled) as worker:
                assert worker.tell(value) == 2 * value
                worker.line.send("no such order")
                worker.process.join(HANG)
                assert worker.process.exitcode == 1


# -- clients that are handed over twice --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_started_again_with_the_same_pickled_client_works_again(method: str, kind: str) -> None:
    transport = slots(1)
    with InferenceServer(double, transport):
        pickled = pickle.dumps(client_of(transport, kind))
        for value in range(5 if method == "fork" else 2):
            with Child(method, use, pickled) as worker:
                assert worker.tell(value) == 2 * value
                worker.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_two_workers_got_takes_two_slots_or_is_refused_to_the_second(kind: str) -> None:
    for count in (1, 2):
        transport = slots(count)
        pickled = pickle.dumps(client_of(transport, kind))
        with (
            InferenceServer(double, transport),
            Child("fork", use, pickled) as first,
            Child("fork", use, pickled) as second,
        ):
            for value in range(3):
                assert first.tell(value) == 2 * value
                found = second.tell(10 + value)
                if count == 2:
                    assert found == 20 + 2 * value
                else:
                    assert found == f"NoFreeSlotError: {refusal(0, 1, 1)}"
            first.kill()
            assert second.tell(30) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_of_another_layout_than_the_server_at_its_address_has_is_refused(kind: str, tmp_path: Path) -> None:
    """As after a restart of the server's program with another policy."""
    address = str(tmp_path / "server")
    pickled = pickle.dumps(client_of(slots(1, address), kind))
    gc.collect()  # the transport that made it
    other = TensorDict({"observation": torch.zeros(3, dtype=torch.float64)})
    transport = ProcessSlotTransport(other, double(other), num_slots=1, address=address)
    with InferenceServer(double, transport):
        found = outcome(pickle.loads(pickled), 1)
        assert isinstance(found, str), f"it was taken for something else, and answered with {found}"
        assert float(call(client_of(transport, kind), other + 1)["action"][0]) == 2


def test_clients_of_one_list_that_are_pickled_apart_have_a_connection_and_slots_each() -> None:
    transport = slots(4)
    with InferenceServer(double, transport):
        one, other = (pickle.loads(pickle.dumps(client)) for client in transport.clients(2))
        assert [outcome(client, value) for value, client in enumerate((one, other))] == [0, 2]
        assert transport.callers() == 4  # each stands for the whole list


def test_a_client_has_one_request_under_way_at_most() -> None:
    transport = slots(1)
    server = InferenceServer(double, transport)
    client = transport.client()
    future = client.submit(request(1))
    with pytest.raises(RuntimeError, match="has a request under way"):
        client(request(2), HANG)
    with server:
        assert float(future.result(HANG)["action"][0]) == 2
        assert outcome(client, 2) == 4


def test_a_transport_takes_requests_through_clients_only() -> None:
    with pytest.raises(NotImplementedError, match=r"make one with client\(\)"):
        slots(1).submit(request(0))
    assert issubclass(InvalidRequestError, ValueError)
