"""Processes that say what no client says, or nothing at all."""

from __future__ import annotations

import logging
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from aioinfer import InferenceServer, MPTransport, PeerDiedError, ProcessSlotTransport
from aioinfer.ipc.pickling import dumps
from aioinfer.ipc.sockets import connect_unix, frame, header
from aioinfer.testing import double, eventually, request, request_of
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import slot_table_of
from aioinfer.transports.ipc.protocol import FromClient
from tests.idle import used_within
from tests.ipc.callers import Worker
from tests.leftovers import needs_descriptors
from tests.limits import HANG
from tests.process_workers import clients_of, greeting
from tests.transports import process_slots

MAKES: list[Any] = [process_slots, MPTransport]
SEED = 11


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="aioinfer")


@contextmanager
def neighbours(transport: Any) -> Iterator[None]:
    """Clients that ask on and on, and to whom nothing must happen, neither before nor after."""
    end = threading.Event()
    clients = [*clients_of(transport, 2, blocking=True)]

    def ask(client: Any) -> int:
        value = 0
        while not end.is_set():
            value += 1
            assert is_double(client(request(value), HANG), value)
            begun.release()
        return value

    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, client) for client in clients]
        try:
            for _ in clients:
                assert begun.acquire(timeout=HANG)
            yield
            for client in clients_of(transport, 2, blocking=True):
                assert is_double(client(request(7), HANG), 7)
        finally:
            end.set()
        for future in asking:
            future.result(HANG)


def is_hung_up(sock: socket.socket) -> bool:
    """Whether the other end closes the line, whatever it said before."""
    sock.settimeout(HANG)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def words(*texts: int) -> bytes:
    return struct.pack(f"={len(texts)}Q", *texts)


RUBBISH: dict[str, tuple[bool, bytes]] = {
    "a request before it joined": (False, words(header(FromClient.REQUEST, 1))),
    "a patient request before it joined": (False, words(header(FromClient.REQUEST_WAIT, 1))),
    "a cancellation before it joined": (False, words(header(FromClient.CANCEL, 1))),
    "an unknown kind": (True, words(header(7))),
    "an unknown kind with a payload": (True, frame(header(6), b"something")),
    "a place beyond its clients": (True, words(header(FromClient.REQUEST, 5))),
    "a cancellation of a place beyond its clients": (True, words(header(FromClient.CANCEL, 5))),
    "an unknown mode": (True, words(header(FromClient.REQUEST, 0, 15))),
}


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("make", MAKES)
def test_who_says_what_no_client_says_is_hung_up_on_and_nobody_else_notices(make: Any, rubbish: str) -> None:
    if make is MPTransport and "place" in rubbish:
        pytest.skip("requests of any number are taken there")
    transport = make()
    joins, data = RUBBISH[rubbish]
    data = greeting(transport) * joins + data
    with InferenceServer(double, transport), neighbours(transport):
        for _ in range(20):
            with connect_unix(transport.address) as sock:
                sock.sendall(data)
                assert is_hung_up(sock)
        eventually(lambda: len(transport.connections.connections) == 1)


REFUSED: dict[str, Callable[[Any], bytes]] = {
    "no clients": lambda transport: greeting(transport, 0),
    "less than no clients": lambda transport: greeting(transport, -1),
    "very many clients": lambda transport: greeting(transport, 10**9),
    "no number of clients": lambda transport: greeting(transport, "many"),
    "something else": lambda transport: frame(header(FromClient.HELLO), dumps(3)),
    "no pickle": lambda transport: frame(header(FromClient.HELLO), b"\x80no pickle"),
    "nothing": lambda transport: words(header(FromClient.HELLO)),
}


@pytest.mark.parametrize("rubbish", REFUSED)
def test_who_wants_to_join_as_nobody_can_is_told_so_and_takes_no_slot(rubbish: str) -> None:
    transport = process_slots()
    data = REFUSED[rubbish](transport)
    with InferenceServer(double, transport), neighbours(transport):
        before = transport.callers()
        socks = [connect_unix(transport.address) for _ in range(10)]
        for sock in socks:
            sock.settimeout(HANG)
            sock.sendall(data)
            assert sock.recv(1 << 16)
        assert transport.callers() == before
        for sock in socks:
            sock.close()
        eventually(lambda: len(transport.connections.connections) == 1)


@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_random_bytes_and_half_frames_cost_nobody_anything(make: Any) -> None:
    chance = random.Random(SEED)
    transport = make()
    join = greeting(transport)
    whole = join + frame(header(FromClient.REQUEST, 0), dumps(request(1)))
    with InferenceServer(double, transport) as server, neighbours(transport), ExitStack() as shut:
        socks: list[socket.socket] = []
        for turn in range(300):
            sock = shut.enter_context(connect_unix(transport.address))
            kind = turn % 4
            if kind == 0:
                data = chance.randbytes(chance.randrange(1, 300))
            elif kind == 1:
                data = join + chance.randbytes(8 * chance.randrange(1, 20))
            elif kind == 2:
                data = whole[: chance.randrange(1, len(whole))]
            else:
                data = words(*[chance.getrandbits(63) for _ in range(chance.randrange(1, 20))])
            try:
                for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
                    sock.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):  # it was hung up on already
                pass
            socks.append(sock)
            if len(socks) > 20 or chance.random() < 0.5:
                socks.pop(chance.randrange(len(socks))).close()
        shut.close()
        eventually(lambda: len(transport.connections.connections) == 1)
        assert server.is_alive


@pytest.mark.parametrize("make", MAKES)
def test_who_dials_and_says_nothing_is_left_alone_until_the_server_ends(make: Any) -> None:
    transport = make()
    with InferenceServer(double, transport) as server, ExitStack() as shut:
        silent = [shut.enter_context(connect_unix(transport.address)) for _ in range(20)]
        with neighbours(transport):
            eventually(lambda: len(transport.connections.connections) == 21)
        server.shutdown()
        for sock in silent:
            assert is_hung_up(sock)


def test_a_process_that_joins_twice_is_hung_up_on_and_leaves_its_slot() -> None:
    transport = process_slots()
    with InferenceServer(double, transport), neighbours(transport):
        before = transport.callers() or 0
        with connect_unix(transport.address) as sock:
            sock.sendall(greeting(transport))
            eventually(lambda: (transport.callers() or 0) > before)
            sock.sendall(greeting(transport))
            assert is_hung_up(sock)
        eventually(lambda: len(transport.connections.connections) == 1)
        assert transport.callers() == before


def test_a_process_that_is_gone_before_it_was_taken_in_takes_no_slot() -> None:
    """Its wish to join, its end, and the end of the process that had the slot are all found at once."""
    transport = ProcessSlotTransport(request(0), double(request(0)), num_slots=1)
    server = InferenceServer(double, transport)
    for _ in range(3):
        with connect_unix(transport.address) as sock:
            sock.sendall(greeting(transport))
            eventually(lambda: server.stats().pending == 0 and transport.callers() == 1)
        with connect_unix(transport.address) as sock:
            sock.sendall(greeting(transport))
        eventually(lambda: server.stats().pending == 0 and not transport.connections.connections)
        assert transport.callers() == 0
    with server:
        assert is_double(transport.client()(request(1), HANG), 1)


class _Counts:
    """Takes any number of rows for another one."""

    def __init__(self, counts: Any, lie: int) -> None:
        self._counts = counts
        self._lie = lie

    def __setitem__(self, slot: int, _: int) -> None:
        self._counts[slot] = self._lie


def test_a_number_of_rows_that_no_slot_has_is_hung_up_on_and_a_wrong_one_shows_only_the_own_slot() -> None:
    """A client can write any number to shared memory, at any time; the server looks once."""
    transport = process_slots()
    with InferenceServer(double, transport), neighbours(transport):
        for lie in (-(2**63), -1, 0, 17, 2**32, 2**63 - 1):
            client = transport.client()
            client(request(1), HANG)
            table = slot_table_of(client)
            table.counts = _Counts(table.counts, lie)  # type: ignore[assignment]
            with pytest.raises(PeerDiedError):
                client(request_of(1, 2), HANG)
        for lie in (1, 16):
            with transport.client() as client:
                client(request_of(*range(16)), HANG)
                table = slot_table_of(client)
                table.counts = _Counts(table.counts, lie)  # type: ignore[assignment]
                assert set(client(request_of(1, 2), HANG)["action"][:, 0].tolist()) <= {0, 2, 4}
        eventually(lambda: len(transport.connections.connections) == 1)


@pytest.mark.parametrize("make", MAKES)
def test_who_reads_none_of_what_it_asked_for_costs_nobody_anything(make: Any) -> None:
    """Its descriptions fill its socket before it joins."""
    transport = make()
    with InferenceServer(double, transport), neighbours(transport), connect_unix(transport.address) as sock:
        sock.settimeout(HANG)
        sock.sendall(words(*[header(FromClient.DESCRIBE)] * 2000))
        eventually(lambda: any(connection.socket.unsent for connection in list(transport.connections.connections)))
        sock.sendall(greeting(transport))
        client = transport.client()
        for value in range(20):
            assert is_double(client(request(value), HANG / 4), value)


# -- nothing at all ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="needs clocks of threads")
@pytest.mark.parametrize("bounded", [False, True], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("make", MAKES)
def test_an_idle_server_and_its_idle_workers_use_no_measurable_processor_time(make: Any, bounded: bool) -> None:
    with Worker("fork") as worker:
        before = set(threading.enumerate())
        transport = make()
        with InferenceServer(double, transport, max_pending=8 if bounded else None):
            for blocking in (True, False):
                for _ in range(4):
                    client = worker.adopt(clients_of(transport, 1, blocking=blocking)[0])
                    assert is_double(worker.call(client, request(1)).result(HANG), 1)
                    worker.ask("submit", client, request(1)).result(HANG)
            threads = set(threading.enumerate()) - before
            assert {thread.name for thread in threads} == {"aioinfer-model", "aioinfer-loop"}
            time.sleep(1.5)  # what the requests left to do: the thread that reads for futures waits for 1 s

            def used_here_and_there() -> tuple[float, float]:
                before_there = worker.ask("seconds").result(HANG)
                here = used_within(1.0, threads)
                return here, worker.ask("seconds").result(HANG) - before_there

            # Once in a few looks, since a loaded machine can only add to it. The worker answers this question, too.
            looks = (used_here_and_there() for _ in range(5))
            assert any(here < 0.002 and there < 0.004 for here, there in looks)


def sockets_until_there_are_none_left() -> Iterator[socket.socket]:
    with suppress(OSError):
        while True:
            yield socket.socket()


@needs_descriptors
def test_a_server_without_descriptors_left_waits_for_some_without_using_the_processor() -> None:
    transport = process_slots()
    join = greeting(transport)
    before = set(threading.enumerate())
    with InferenceServer(double, transport), ExitStack() as shut, socket.socket(socket.AF_UNIX) as late:
        client = transport.client()
        assert is_double(client(request(1), HANG), 1)
        threads = set(threading.enumerate()) - before
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        shut.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, limits[1]))
        for sock in sockets_until_there_are_none_left():
            shut.enter_context(sock)
        late.connect("\0" + transport.address[1:])
        late.settimeout(HANG)
        assert is_double(client(request(2), HANG), 2)
        used = min(used_within(0.5, threads) for _ in range(3))
        shut.close()
        late.sendall(join)
        assert late.recv(8)  # it was taken in at last
        assert used < 0.05
