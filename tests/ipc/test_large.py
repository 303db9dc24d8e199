"""Requests and replies that are larger than what a socket holds, so that they travel in pieces."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, MPTransport, PeerDiedError, ServerClosedError
from aioinfer.ipc.pickling import dumps
from aioinfer.ipc.sockets import connect_unix, frame, header, wait_for_any
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.transports.ipc import server as server_module
from aioinfer.transports.ipc.connection import ClientConnection
from aioinfer.transports.ipc.protocol import FromClient, State
from tests.limits import HANG
from tests.process_workers import KINDS, Child, call, client_of, clients_of, greeting, outcome

BIG = 1_000_000  # floats: 20 sockets full
SOON = HANG / 5


def repeated(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": td["observation"][:, :1].repeat(1, BIG)}, td.batch_size)


class Calling:
    """Clients of one kind that share a connection, each called from a thread or a task of its own."""

    def __init__(self, transport: MPTransport, kind: str, count: int, run: Any) -> None:
        self.clients = clients_of(transport, count, blocking=kind == "blocking")
        self._kind = kind
        self._run = run

    def call(self, index: int, td: TensorDictBase, timeout: float | None = None) -> Future[TensorDictBase]:
        client = self.clients[index]

        async def wait() -> TensorDictBase:
            async with asyncio.timeout(timeout):
                reply: TensorDictBase = await client(td)
            return reply

        future: Future[TensorDictBase] = (
            self._run.submit(client, td, timeout) if self._kind == "blocking" else self._run.start_task_soon(wait)
        )
        return future


@contextmanager
def calling(transport: MPTransport, kind: str, count: int) -> Iterator[Calling]:
    with ThreadPoolExecutor(8) if kind == "blocking" else start_blocking_portal() as run:
        yield Calling(transport, kind, count, run)


@pytest.mark.parametrize("kind", KINDS)
def test_large_requests_and_replies_of_many_clients_find_their_callers(kind: str) -> None:
    transport = MPTransport()
    with InferenceServer(double, transport), calling(transport, kind, 4) as callers:
        for turn in range(3):
            replies = [callers.call(index, request(10 * turn + index, size=BIG)) for index in range(4)]
            for index, reply in enumerate(replies):
                assert bool((reply.result(HANG)["action"] == 2 * (10 * turn + index)).all())


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_a_large_request_arrives_while_another_caller_of_its_process_waits(kind: str) -> None:
    transport = MPTransport()
    model = GatedModel()
    with InferenceServer(model, transport) as server, calling(transport, kind, 2) as callers:
        first = callers.call(0, request(1))
        assert model.entered.wait(HANG)
        second = callers.call(1, request(2, size=BIG))
        try:
            eventually(lambda: server.stats().pending == 1, within=SOON)
        finally:
            model.open()
            assert first.result(HANG)["action"][0] == 2
            assert second.result(HANG)["action"][0] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_request_that_is_given_up_half_way_changes_nothing_for_the_next(kind: str) -> None:
    model = GatedModel()
    transport = MPTransport()
    with InferenceServer(model, transport), calling(transport, kind, 2) as callers:
        first = callers.call(1, request(0))
        assert model.entered.wait(HANG)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                callers.call(0, request(1, size=BIG), 0.01).result(HANG)
        model.open()
        assert bool((callers.call(0, request(3, size=BIG)).result(HANG)["action"] == 6).all())
        assert first.result(HANG)["action"][0] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drain", [False, True], ids=["at once", "drained"])
def test_large_requests_end_when_the_server_shuts_down_before_they_are_there(drain: bool, kind: str) -> None:
    model = GatedModel()
    transport = MPTransport()
    with InferenceServer(model, transport) as server, calling(transport, kind, 3) as callers:
        first = transport.client().submit(request(0))
        assert model.entered.wait(HANG)
        calls = [callers.call(index, request(1, size=BIG), SOON) for index in range(3)]
        eventually(lambda: transport.connections.connections.__len__() == 2)
        closing = threading.Thread(target=server.shutdown, args=(HANG,), kwargs={"drain": drain})
        closing.start()
        model.open()
        closing.join(HANG)
        assert first.result(HANG)["action"][0] == 0
        for call in calls:
            error = call.exception(HANG)
            assert error is None or isinstance(error, ServerClosedError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_request_ends_if_the_server_ended_before_its_process_could_read_that_it_was_taken_in(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = MPTransport()
    ended, post = threading.Event(), ClientConnection.send

    def post_when_it_has_ended(*args: Any) -> None:
        assert ended.wait(HANG)
        post(*args)

    monkeypatch.setattr(ClientConnection, "send", post_when_it_has_ended)
    with InferenceServer(double, transport) as server, calling(transport, kind, 1) as callers:
        reply = callers.call(0, request(1, size=BIG), HANG)
        eventually(lambda: any(connection.accepted for connection in list(transport.connections.connections)))
        server.shutdown()
        ended.set()
        assert isinstance(reply.exception(2 * HANG), ServerClosedError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_request_ends_if_the_server_ends_between_two_of_its_pieces(kind: str) -> None:
    transport = MPTransport()
    model = GatedModel()
    with InferenceServer(model, transport), calling(transport, kind, 1) as callers:
        running = transport.client().submit(request(0))
        assert model.entered.wait(HANG)
        reply = callers.call(0, request(1, size=BIG), HANG)
        eventually(lambda: any(connection.socket.readable() for connection in list(transport.connections.connections)))
        transport.status.set_state(State.ENDED)
        transport.connections.read_all()
        assert isinstance(reply.exception(2 * HANG), ServerClosedError)
        model.open()
        assert running.result(HANG)["action"][0] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drain", [False, True], ids=["at once", "drained"])
def test_large_replies_arrive_though_the_server_shuts_down_meanwhile(
    drain: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = MPTransport()
    model = GatedModel(repeated)
    posted, post = threading.Event(), ClientConnection.send

    def post_and_say_so(*args: Any) -> None:
        post(*args)
        posted.set()

    monkeypatch.setattr(ClientConnection, "send", post_and_say_so)
    monkeypatch.setattr(server_module, "NO_PROGRESS", HANG)  # the client may be slow to read
    monkeypatch.setattr(server_module, "FLUSH_LIMIT", HANG)
    with InferenceServer(model, transport) as server, calling(transport, kind, 1) as callers:
        reply = callers.call(0, request(3), HANG)
        assert model.entered.wait(HANG)
        assert posted.wait(HANG)  # a client that is told of the end while it still posts ends its request itself
        closing = threading.Thread(target=server.shutdown, args=(HANG,), kwargs={"drain": drain})
        closing.start()
        model.open()
        closing.join(HANG)
        assert bool((reply.result(HANG)["action"] == 3).all())


def ask_for_much(line: Connection[Any, Any], client: Any) -> None:
    """Get a small reply and ask for a large one; say what came of it, and of a small one afterwards."""
    line.send(outcome(client, 1))
    line.recv()
    try:
        line.send(float(call(client, request(3), 2 * HANG)["action"].sum()))
    except Exception as error:
        line.send(type(error).__name__)
    line.send(outcome(client, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_that_stood_still_while_the_server_shut_down_is_not_left_waiting(kind: str) -> None:
    """Its reply is half in its socket."""
    gate, passes = threading.Event(), threading.Semaphore(0)

    def model(td: TensorDictBase) -> TensorDictBase:
        passes.release()
        assert gate.wait(HANG)
        return repeated(td)

    transport = MPTransport()
    with (
        Child("fork", ask_for_much, client_of(transport, kind)) as worker,
        InferenceServer(model, transport) as server,
    ):
        gate.set()
        assert worker.hear() == 1
        gate.clear()
        assert passes.acquire(timeout=HANG)
        worker.line.send("go on")
        assert passes.acquire(timeout=HANG)
        pid = worker.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: " T " in Path(f"/proc/{pid}/stat").read_text())
        gate.set()
        eventually(lambda: server.stats().ok == 2)
        server.shutdown(HANG)
        os.kill(pid, signal.SIGCONT)
        assert worker.hear() in (3 * BIG, ServerClosedError.__name__, PeerDiedError.__name__)
        assert str(worker.hear()).startswith(("ServerClosedError: ", "PeerDiedError: "))


def test_processes_that_read_nothing_do_not_hold_a_shutdown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits once for all of them together."""
    waits: list[float] = []

    def wait_and_note(wires: Any, seconds: float) -> bool:
        waits.append(seconds)
        return wait_for_any(wires, seconds)

    monkeypatch.setattr(server_module, "wait_for_any", wait_and_note)
    transport = MPTransport()
    with InferenceServer(repeated, transport) as server, ExitStack() as shut:
        asked = greeting(transport) + frame(header(FromClient.REQUEST, 1), dumps(request(1)))
        for _ in range(12):
            shut.enter_context(connect_unix(transport.address)).sendall(asked)
        eventually(lambda: server.stats().ok == 12)
        begun_at = time.monotonic()
        server.shutdown(1.0)
        assert time.monotonic() - begun_at < 5
        assert sum(waits) < 1
