"""Processes that are out of descriptors, and servers whose backlog is full: what fails is told, and heals."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aioinfer import ClientClosedError, InferenceClient, InferenceServer, MPTransport
from aioinfer.ipc import sockets
from aioinfer.ipc.sockets import Listener, connect_unix
from aioinfer.testing import double, eventually, request
from aioinfer.testing.callers import is_double
from tests.leftovers import needs_descriptors
from tests.limits import HANG
from tests.process_workers import KINDS, Child, call, client_of, is_asking, outcome
from tests.transports import process_slots

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: of a process that has threads

MAKES: list[Any] = [process_slots, MPTransport]


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    gc.collect()  # what it would find inside has descriptors
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as shut:
        shut.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
        try:
            while True:
                shut.enter_context(open("/dev/null"))
        except OSError:
            yield


def use_without_descriptors(line: Any, client: Any) -> None:
    """Call a client when there is no descriptor to connect with; then join when none is left for what is shared."""
    answers: list[str] = []

    def ask(value: float) -> None:
        answers.append(str(outcome(client, value)))

    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as threads:
        runner.get_loop()  # which needs descriptors itself
        threads.submit(int).result()
        with no_descriptor_left():
            line.send(error_of(partial(ask_at_once, client, runner)))
        calling = threads.submit(ask, 1.0)
        eventually(lambda: is_asking(client))
        with no_descriptor_left():
            line.send("asked")
            line.recv()
            calling.result(HANG)
        ask(2.0)
        line.send(answers)
        line.recv()


def ask_at_once(client: Any, runner: asyncio.Runner) -> None:
    """Call a client without making a thread or an event loop, for which there may be no descriptor."""

    async def wait() -> None:
        await client(request(0.0))

    if isinstance(client, InferenceClient):
        client.submit(request(0.0)).result(HANG)
    else:
        runner.run(wait())


def error_of(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "none"


@needs_descriptors
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_a_worker_without_descriptors_is_told_so_and_its_next_request_connects_anew(make: Any, kind: str) -> None:
    transport = make()
    with Child("fork", use_without_descriptors, client_of(transport, kind)) as child:
        assert child.hear() == "OSError"
        assert child.hear() == "asked"
        with InferenceServer(double, transport):
            child.line.send("it serves")
            first, second = child.hear()
            assert "no file descriptor is left" in first
            assert second == "4.0"
            eventually(lambda: len(transport.connections.connections) == 1)


@pytest.mark.parametrize("make", MAKES)
def test_a_server_that_cannot_watch_a_new_connection_hangs_up_on_it_and_takes_the_next(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = make()
    with InferenceServer(double, transport):
        neighbour = transport.client()
        assert is_double(neighbour(request(1), HANG), 1)
        watch, failures = transport.connections.handshake_selector.register, iter([OSError("no space for another one")])

        def fail_once(source: Any, handler: Any, **options: Any) -> None:
            if source is not transport.connections.listener:
                for error in failures:
                    raise error
            watch(source, handler, **options)

        monkeypatch.setattr(transport.connections.handshake_selector, "register", fail_once)
        client = transport.client()
        assert "went away before it took this process in" in str(outcome(client, 1))
        assert outcome(client, 2) == 4
        assert is_double(neighbour(request(3), HANG), 3)
        assert len(transport.connections.connections) == 2


# -- a full backlog ----------------------------------------------------------------------------------------


@contextmanager
def full(make: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[socket.socket]]]:
    """A transport whose backlog is full; and who fills it."""
    with monkeypatch.context() as patched:
        patched.setattr(sockets, "BACKLOG", 1)
        transport = make()
    with ExitStack() as shut:
        waiting: list[socket.socket] = []
        while True:
            sock = shut.enter_context(socket.socket(socket.AF_UNIX))
            if not sockets.try_connect(sock, transport.address):
                break
            waiting.append(sock)
        yield transport, waiting


@pytest.mark.parametrize("make", MAKES)
async def test_the_first_use_of_a_client_never_blocks_the_event_loop(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full(make, monkeypatch) as (transport, _):
        clients = transport.async_clients(3)
        began = time.monotonic()
        calls = [asyncio.ensure_future(client(request(value))) for value, client in enumerate(clients)]
        submitted = transport.async_client().submit(request(7))
        await asyncio.sleep(0)
        assert time.monotonic() - began < HANG / 2
        calls[2].cancel()
        async with InferenceServer(double, transport):
            async with asyncio.timeout(HANG):
                assert is_double(await submitted, 7)
                for value, reply in enumerate(await asyncio.gather(*calls[:2])):
                    assert is_double(reply, value)


@pytest.mark.parametrize("make", MAKES)
def test_threads_wait_for_a_full_backlog_no_longer_than_their_deadline(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full(make, monkeypatch) as (transport, _), ThreadPoolExecutor(2) as threads:
        client, other = transport.client(), transport.client()
        with pytest.raises(TimeoutError):
            client(request(1), 0.05)
        waiting, future = threads.submit(client, request(2)), other.submit(request(3))
        with InferenceServer(double, transport):
            assert is_double(waiting.result(HANG), 2)
            assert is_double(future.result(HANG), 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_who_waits_for_a_full_backlog_ends_with_its_client(
    make: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full(make, monkeypatch) as (transport, _), ThreadPoolExecutor(1) as threads:
        client = client_of(transport, kind)
        waiting = threads.submit(call, client, request(1))
        eventually(lambda: is_asking(client))
        client.close()
        assert isinstance(waiting.exception(HANG / 4), ClientClosedError)


def test_an_unused_client_can_be_closed_though_the_backlog_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    with full(process_slots, monkeypatch) as (transport, _):
        clients = transport.clients(16)
        for client in clients:
            client.close()
        with InferenceServer(double, transport):
            eventually(lambda: transport.free_slots == 16)
            assert outcome(transport.client(), 1) == 2


# -- addresses ---------------------------------------------------------------------------------------------


def listen(line: Any, address: str) -> None:
    while line.recv():
        try:
            listener = Listener(address)
        except OSError as error:
            line.send(type(error).__name__)
        else:
            line.send("listens")
            line.recv()
            listener.close()
            line.send("closed")


def test_of_servers_that_replace_a_stale_path_at_once_exactly_one_listens(tmp_path: Path) -> None:
    address = str(tmp_path / "server")
    with ExitStack() as shut:
        children = [shut.enter_context(Child("fork", listen, address)) for _ in range(3)]
        for _ in range(40):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(address)
            for child in children:
                child.line.send("listen")
            found = [child.hear() for child in children]
            assert sorted(found) == ["OSError", "OSError", "listens"]
            with connect_unix(address):
                pass
            first = children[found.index("listens")]
            assert first.tell("close") == "closed"
            assert not list(tmp_path.iterdir())


def test_a_server_that_ends_leaves_the_path_of_its_successor_alone(tmp_path: Path) -> None:
    address = str(tmp_path / "server")
    first = Listener(address)
    os.unlink(address)  # somebody was in a hurry
    second = Listener(address)
    first.close()
    with connect_unix(address):
        accepted = second.accept()
        assert accepted is not None
        accepted.close()
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_a_killed_process_left_keeps_nobody_from_listening(tmp_path: Path) -> None:
    address = str(tmp_path / "server")
    (tmp_path / "server.lock").touch()
    listener = Listener(address)
    assert [path.name for path in tmp_path.iterdir()] == ["server"]
    taken: list[str] = []
    threads = [threading.Thread(target=lambda: taken.append(error_of(lambda: Listener(address)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert taken == ["OSError"] * 4
    listener.close()
    assert not list(tmp_path.iterdir())
