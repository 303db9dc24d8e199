"""Processes that are killed: workers at any moment, a server, a program with all that it has started."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from tensordict import TensorDict, TensorDictBase

from aioinfer import (
    InferenceClient,
    InferenceServer,
    MPTransport,
    PeerDiedError,
    ProcessSlotTransport,
    ServerClosedError,
    ServerPausedError,
)
from aioinfer.ipc.sockets import connect_unix
from aioinfer.testing import double, eventually, request
from aioinfer.testing.inspection import has_pending_job
from tests.effort import Effort
from tests.leftovers import assert_no_memory_stays, is_there, shared_memory_of
from tests.limits import HANG
from tests.methods import SPAWN
from tests.process_workers import Child, answer, ask_always, clients_of
from tests.programs import running

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # 3.12: of a process that has threads
]

VICTIMS = 4
Transport = MPTransport | ProcessSlotTransport


def transport_of(kind: str, slots: int) -> Transport:
    if kind == "mp":
        return MPTransport()
    return ProcessSlotTransport(request(0), double(request(0)), num_slots=slots)


# -- workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp", "process-slots"])
def test_workers_that_are_killed_at_any_moment_change_nothing_for_the_others(kind: str, effort: Effort) -> None:
    chance = effort.random()
    transport = transport_of(kind, slots=4 * 2 + VICTIMS * 2)  # none to spare
    with ExitStack() as stack:
        steady = [
            stack.enter_context(
                Child("fork", ask_always, clients_of(transport, 2, blocking=identity % 2 == 0), identity)
            )
            for identity in range(4)
        ]
        server = stack.enter_context(InferenceServer(answer, transport, max_batch_size=8))
        handed = [clients_of(transport, 2, blocking=index % 2 == 0) for index in range(VICTIMS)]
        victims: dict[int, Child] = {}
        try:
            for kill in range(effort.times(20, stress=100)):
                index = kill if kill < VICTIMS else chance.randrange(VICTIMS)
                if index in victims:
                    assert not victims[index].line.poll(), victims[index].line.recv()
                    victims[index].__exit__()
                # It gets the clients of the one before: slots that were not freed would be missing at once.
                victims[index] = Child("fork", ask_always, handed[index], 1000 + kill)
                time.sleep(chance.uniform(0, 0.03))  # orders nothing: any moment
        finally:
            for victim in victims.values():
                victim.__exit__()
        for child in steady:
            child.goes_on()
        if isinstance(transport, ProcessSlotTransport):
            eventually(lambda: transport.callers() == 8)
            assert len(transport.clients(8)) == 8
        for child in steady:
            child.end()
        assert server.stats().failed == 0


def ask_much_and_stop(line: Connection[Any, Any], client: InferenceClient) -> None:
    """Ask for 500 replies, stand still before any comes, and when continued say whether all are right."""
    client(request(0), HANG)
    line.send("joined")
    line.recv()
    replies = [client.submit(request(number)) for number in range(500)]
    line.send("asked")
    os.kill(os.getpid(), signal.SIGSTOP)
    line.send(all((reply.result(HANG)["action"] == number).all() for number, reply in enumerate(replies)))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_that_stands_still_while_20_megabytes_come_for_it_costs_the_others_nothing() -> None:
    """What does not fit into its socket is kept, and is all there when the worker goes on."""
    gate = threading.Event()

    def model(td: TensorDictBase) -> TensorDictBase:
        assert gate.wait(HANG)
        return TensorDict({"action": td["observation"][:, :1].repeat(1, 10_000)}, td.batch_size)

    transport = MPTransport()
    with Child("fork", ask_much_and_stop, transport.client()) as stopped, InferenceServer(model, transport) as server:
        gate.set()
        assert stopped.hear() == "joined"
        gate.clear()
        assert stopped.tell("go on") == "asked"
        eventually(lambda: " T " in Path(f"/proc/{stopped.process.pid}/stat").read_text())
        gate.set()
        client = transport.client()
        eventually(lambda: client(request(2), HANG) is not None and server.stats().ok > 500)
        for number in range(100):
            assert client(request(number), HANG)["action"][0] == number
        assert stopped.process.pid is not None
        os.kill(stopped.process.pid, signal.SIGCONT)
        assert stopped.hear() is True


# -- the server --------------------------------------------------------------------------------------------


def serve(line: Connection[Any, Any], given: Any, refusing: bool) -> None:
    """Serve, but stand still at a request of less than 0 until killed, ``refusing``, when told so, what comes."""

    def pause() -> None:
        with server.paused(pending="reject"):
            pass

    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            line.send("stands still")
            if refusing:
                assert line.recv() == "refuse"
                threading.Thread(target=pause).start()
                eventually(lambda: has_pending_job(server))  # it refuses what comes, and waits for this pass
                line.send("refuses")
            threading.Event().wait()
        return double(td)

    with InferenceServer(model, given.take(), max_batch_size=6) as server:
        line.send("serves")
        threading.Event().wait()


def call_until_it_fails(line: Connection[Any, Any], clients: list[Any]) -> None:
    """Call with each client, once more when told so, and then again; send the error of each, and when it came."""

    def block(client: Any, value: float) -> tuple[str, float]:
        try:
            client(request(value))
        except Exception as error:
            return type(error).__name__, time.monotonic()
        return "", time.monotonic()

    async def wait(client: Any, value: float) -> tuple[str, float]:
        try:
            await client(request(value))
        except Exception as error:
            return type(error).__name__, time.monotonic()
        return "", time.monotonic()

    async def wait_all() -> None:
        for value in (1, -1, 1):
            line.send(await asyncio.gather(*[wait(client, value) for client in clients]))
            if not told:
                told.append(line.recv())

    def block_all() -> None:
        with ThreadPoolExecutor(len(clients)) as pool:
            for value in (1, -1, 1):
                line.send(list(pool.map(block, clients, [value] * len(clients))))
                if not told:
                    told.append(line.recv())

    told: list[str] = []
    if isinstance(clients[0], InferenceClient):
        block_all()
    else:
        asyncio.run(wait_all())


@pytest.mark.parametrize("kind", ["mp", "process-slots"])
@pytest.mark.parametrize(
    ("method", "refusing"),
    [
        pytest.param("fork", False, id="fork"),
        pytest.param("forkserver", False, id="forkserver"),
        pytest.param("spawn", False, id="spawn", marks=pytest.mark.stress),
        pytest.param("fork", True, id="refusing"),
    ],
)
def test_a_server_that_is_killed_ends_every_call_at_once(
    method: str, refusing: bool, kind: str, record_property: Callable[[str, object], None]
) -> None:
    transport = transport_of(kind, slots=7)
    blocking, awaiting = clients_of(transport, 3, blocking=True), clients_of(transport, 3, blocking=False)
    own = transport.client()
    given = transport.hand_off()
    with Child(method, serve, given, refusing) as server:
        given.close()
        assert server.hear() == "serves"
        with (
            Child("fork", call_until_it_fails, blocking) as threads,
            Child("fork", call_until_it_fails, awaiting) as tasks,
        ):
            children = (threads, tasks)
            for child in children:
                assert [name for name, _ in child.hear()] == [""] * 3
            if refusing:
                own(request(1), HANG)  # joined, it sends at once, and has looked whether the server refuses
                under_way = own.submit(request(-1))
                assert server.hear() == "stands still"
            for child in children:
                child.line.send("once more")
            assert server.tell("refuse") == "refuses" if refusing else server.hear() == "stands still"
            killed_at = time.monotonic()
            server.kill()
            ends = [child.hear() for child in children]
            names = [name for ended in ends for name, _ in ended]
            if refusing:
                assert isinstance(under_way.exception(HANG), PeerDiedError)
            else:
                assert set(names) == {PeerDiedError.__name__}
            assert set(names) <= {PeerDiedError.__name__, ServerPausedError.__name__}  # of calls that came later
            for child, ended in zip(children, ends, strict=True):
                latest = max(at for _, at in ended) - killed_at
                record_property("seconds", latest)
                print(f"the last call ended {1000 * latest:.1f} ms after the kill")
                assert latest < HANG / 2
                # A process that connects while the server is taken down may still find it; a refused call came before.
                gone = {PeerDiedError.__name__, ServerClosedError.__name__}
                assert {name for name, _ in child.hear()} <= gone | ({ServerPausedError.__name__} & set(names))


# -- a program ---------------------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, os, sys, threading
import torch
from aioinfer import InferenceServer
from aioinfer.testing import request
from tests.process_workers import clients_of, run_target
from tests.ipc.test_killed import call_until_it_fails, double, transport_of

def model(td):
    if (td["observation"] < 0).any():
        print("stands still\\n", end="", flush=True)  # at once: the other thread prints too
        threading.Event().wait()
    return double(td)

if __name__ == "__main__":
    torch.set_num_threads(1)
    context = multiprocessing.get_context("METHOD")
    transport = transport_of("KIND", slots=9)
    server = InferenceServer(model, transport).start()
    first = transport.clients(1)
    first[0](request(1), 20)  # a client that has been used before the others are forked
    children = []
    for blocking in (True, False):
        line, other = context.Pipe()
        clients = clients_of(transport, 3, blocking=blocking)
        context.Process(target=run_target, args=(call_until_it_fails, other, clients)).start()
        children.append(line)
        other.close()
    for line in children:
        assert [name for name, _ in line.recv()] == [""] * 3
    for line in children:
        line.send("once more")
    print(f"{transport.address}\\n", end="", flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("kind", ["mp", "process-slots"])
@pytest.mark.parametrize("method", ["fork", SPAWN])
def test_a_program_that_is_killed_leaves_no_process_and_no_memory(method: str, kind: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("METHOD", method).replace("KIND", kind))
    with running(program) as process:
        said = {process.stdout.readline().strip() for _ in range(2)}
        (address,) = said - {"stands still"}
        assert address.startswith("@aioinfer-") or sys.platform != "linux"
        assert is_open(address)
        assert is_there(-process.pid)
        memory = shared_memory_of(process.pid)
        process.kill()
    eventually(lambda: not is_there(-process.pid))
    assert not is_open(address)
    assert_no_memory_stays(memory)


def is_open(address: str) -> bool:
    try:
        connect_unix(address).close()
    except ServerClosedError:
        return False
    return True
