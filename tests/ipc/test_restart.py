"""Servers in processes of their own: given a transport, killed, and followed by others at the same address."""

from __future__ import annotations

import asyncio
import pickle
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from aioinfer import InferenceServer, MPTransport, ProcessSlotTransport, connect
from aioinfer.testing import double, eventually, request
from tests.limits import HANG
from tests.methods import METHODS
from tests.process_workers import KINDS, Child, call, client_of, outcome
from tests.transports import process_slots

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: of a process that has threads

MAKES: list[Any] = [process_slots, MPTransport]


def serve_at(line: Connection[Any, Any], slots: bool, address: str) -> None:
    """Serve at an address until told to end."""
    transport: Any = MPTransport(address=address) if not slots else None
    if slots:
        transport = ProcessSlotTransport(request(0), double(request(0)), num_slots=2, address=address)
    with InferenceServer(double, transport):
        line.send("serves")
        line.recv()


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("killed", "blocking"),
        ("killed", "awaiting"),
        ("shut down", "awaiting"),
        ("shut down", "blocking"),
    ],
)
@pytest.mark.parametrize("slots", [True, False], ids=["process_slots", "MPTransport"])
def test_a_client_finds_the_next_server_at_its_address(slots: bool, end: str, kind: str, tmp_path: Path) -> None:
    address = str(tmp_path / "server")
    client: Any = None
    for value in range(3):
        with Child("fork", serve_at, slots, address) as server:
            assert server.hear() == "serves"
            client = client or client_of(connect(address, timeout=HANG), kind)
            again = pickle.loads(pickle.dumps(client))
            assert [outcome(one, value) for one in (client, again)] == [2 * value] * 2
            if end == "killed":
                server.kill()
            else:
                server.line.send("end")
                server.process.join(HANG)
        for _ in range(2):
            assert str(outcome(client, 1)).startswith(("PeerDiedError: ", "ServerClosedError: "))


async def test_an_event_loop_finds_the_next_server_at_its_address(tmp_path: Path) -> None:
    """The loop, and its clients, are the same all the time."""
    address = str(tmp_path / "server")
    client: Any = None
    for value in range(4):
        with Child("fork", serve_at, True, address) as server:
            assert server.hear() == "serves"
            client = client or connect(address, timeout=HANG).async_client()
            async with asyncio.timeout(HANG):
                assert (await client(request(value)))["action"][0] == 2 * value
            server.kill()
        with pytest.raises(Exception, match="server"):
            await client(request(1))


# -- transports that are given away --------------------------------------------------------------------------


def serve_given(line: Connection[Any, Any], given: Any) -> None:
    """Serve a transport of another process until told to end; then serve it once more."""
    transport = given.take()
    for _ in range(2):
        with InferenceServer(double, transport):
            line.send("serves")
            line.recv()
        line.send("closed")
        line.recv()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MAKES)
def test_clients_of_a_transport_that_was_given_away_were_made_before_or_afterwards(make: Any, method: str) -> None:
    transport = make()
    clients = [client_of(transport, kind) for kind in KINDS]
    given = transport.hand_off()
    with Child(method, serve_given, given) as server:
        given.close()
        assert server.hear() == "serves"
        clients += [client_of(transport, kind) for kind in KINDS]
        clients += [client_of(connect(transport.address, timeout=HANG), kind) for kind in KINDS]
        assert [outcome(client, value) for value, client in enumerate(clients)] == [0, 2, 4, 6, 8, 10]
        assert server.tell("end") == "closed"
        for client in clients:
            assert str(outcome(client, 1)).startswith("ServerClosedError: ")
        assert server.tell("again") == "serves"
        assert [outcome(client, value) for value, client in enumerate(clients)] == [0, 2, 4, 6, 8, 10]
        assert server.tell("end") == "closed"


@pytest.mark.parametrize("make", MAKES)
def test_a_transport_is_given_away_once_and_served_by_its_new_owner_only(make: Any) -> None:
    transport = make()
    given = transport.hand_off()
    try:
        with pytest.raises(RuntimeError, match="given away"):
            transport.hand_off()
        with pytest.raises(RuntimeError, match="given to a server in another process"):
            InferenceServer(double, transport)
    finally:
        given.close()
    used = make()
    with InferenceServer(double, used):
        with pytest.raises(RuntimeError, match="in use already"):
            used.hand_off()
        assert call(used.client(), request(1))["action"][0] == 2


def test_clients_wait_for_the_process_that_a_transport_was_given_to() -> None:
    transport = process_slots()
    client = transport.client()
    given = transport.hand_off()
    waiting = threading.Event()
    found: list[Any] = []

    def ask() -> None:
        waiting.set()
        found.append(outcome(client, 3))

    thread = threading.Thread(target=ask)
    thread.start()
    assert waiting.wait(HANG)
    with Child("fork", serve_given, given) as server:
        given.close()
        assert server.hear() == "serves"
        thread.join(HANG)
        assert found == [6]
    eventually(lambda: "Error" in str(outcome(client, 1)))
