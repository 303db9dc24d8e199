"""Processes that have used a client, or serve, and then fork."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from aioinfer import InferenceServer, MPTransport, connect
from aioinfer.testing import double, eventually, request
from aioinfer.testing.inspection import locks_of
from tests.effort import Effort
from tests.leftovers import needs_descriptors
from tests.limits import HANG
from tests.process_workers import KINDS, Child, answer, ask_always, client_of, clients_of, outcome, use
from tests.programs import running
from tests.transports import process_slots

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # 3.12: of a process that has threads
]

MAKES: list[Any] = [process_slots, MPTransport]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_a_client_that_was_used_before_a_fork_works_on_both_sides_of_it(make: Any, kind: str) -> None:
    transport = make()
    with InferenceServer(double, transport):
        client = client_of(transport, kind)
        assert outcome(client, 1) == 2
        with Child("fork", use, client) as child, Child("fork", use, client) as other:
            for value in range(10):
                assert child.tell(value) == 2 * value
                assert outcome(client, 100 + value) == 2 * (100 + value)
                assert other.tell(200 + value) == 2 * (200 + value)
            assert len(transport.connections.connections) == 3  # each has a connection of its own
            child.kill()
            assert outcome(client, 5) == 10
            assert other.tell(6) == 12
        eventually(lambda: len(transport.connections.connections) == 1)
        assert outcome(client, 7) == 14


@contextmanager
def held_elsewhere(*locks: Any) -> Iterator[None]:
    """Locks that another thread holds."""
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            begun.set()
            end.wait(HANG)

    thread = threading.Thread(target=hold)
    thread.start()
    assert begun.wait(HANG)
    try:
        yield
    finally:
        end.set()
        thread.join()


def use_all(line: Connection[Any, Any], transport: Any, client: Any, remote: Any) -> None:
    """Use what a child has inherited, and what it makes of it."""
    line.recv()
    line.send([outcome(one, 3) for one in (client, transport.client(), remote.client(), remote.async_client())])
    line.recv()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_locks_that_other_threads_hold_at_a_fork_keep_no_child_waiting(make: Any, kind: str) -> None:
    transport = make()
    with InferenceServer(double, transport) as server, connect(transport.address, timeout=HANG) as remote:
        client = client_of(transport, kind)
        assert outcome(client, 1) == 2
        with server.paused("keep"):
            under_way = [one.submit(request(5)) for one in transport.clients(2)]  # whose answers are the parent's
            with held_elsewhere(*locks_of(transport, client)):
                child = Child("fork", use_all, transport, client, remote)
        with child:
            assert child.tell("use all") == [6] * 4
            assert outcome(client, 2) == 4
            assert [future.result(HANG)["action"][0] for future in under_way] == [10, 10]


def use_and_fork(line: Connection[Any, Any], client: Any) -> None:
    """Use a client, fork a child that uses it too, and do both on and on; then do nothing."""
    first = outcome(client, 1)
    context: Any = multiprocessing.get_context("fork")
    there, here = context.Pipe()
    child = context.Process(target=use, args=(here, client))
    child.start()
    line.send((first, child.pid))
    while (order := line.recv()) != "end":
        there.send(order)
        line.send((outcome(client, 100 + order), there.recv()))
    there.send("return")
    child.join()
    line.send("ended")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_a_worker_may_fork_after_it_has_used_its_client(make: Any, kind: str) -> None:
    transport = make()
    with InferenceServer(double, transport), Child("fork", use_and_fork, client_of(transport, kind)) as worker:
        first, _ = worker.hear()
        assert first == 2
        for value in range(10):
            assert worker.tell(value) == (2 * (100 + value), 2 * value)
        assert worker.tell("end") == "ended"


def fork_and_stay(line: Connection[Any, Any], client: Any) -> None:
    """Use a client, and fork a child that never does."""
    first = outcome(client, 1)
    pid = os.fork()
    if pid == 0:
        time.sleep(HANG)
        os._exit(0)
    line.send((first, pid))
    line.recv()


@pytest.mark.parametrize("kind", KINDS)
def test_the_slot_of_a_killed_worker_is_free_though_a_child_of_it_lives(kind: str) -> None:
    transport = process_slots()
    with InferenceServer(double, transport), Child("fork", fork_and_stay, client_of(transport, kind)) as worker:
        first, pid = worker.hear()
        try:
            assert (first, transport.callers()) == (2, 1)
            worker.kill()
            eventually(lambda: transport.callers() == 0)
            os.kill(pid, 0)  # the child is there
        finally:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("make", MAKES)
def test_a_fork_under_load_disturbs_nobody(make: Any, effort: Effort) -> None:
    """Children of the server's process, forked while its threads work."""
    transport = make()
    with (
        Child("fork", ask_always, clients_of(transport, 2, blocking=True), 1) as threads,
        Child("fork", ask_always, clients_of(transport, 2, blocking=False), 2) as tasks,
        InferenceServer(answer, transport),
    ):
        client = client_of(transport, "blocking")
        for value in range(effort.times(6, stress=20)):
            assert outcome(client, value) == 2 * value + 1
            with Child("fork", use, client) as child:
                assert child.tell(value) == 2 * value + 1
        for loaded in (threads, tasks):
            loaded.goes_on()
            loaded.end()


@needs_descriptors
@pytest.mark.parametrize("make", MAKES)
def test_workers_that_come_and_go_leave_no_descriptor_in_the_servers_process(make: Any, effort: Effort) -> None:
    transport = make()

    def descriptors() -> int:
        gc.collect()  # the pipes of the children
        return len(os.listdir("/proc/self/fd"))

    def come_and_go() -> None:
        for value in range(effort.times(6, stress=12)):
            kind = KINDS[value % 2]
            with Child("fork", use, pickle.dumps(client_of(transport, kind))) as worker:
                assert worker.tell(value) == 2 * value
                if value % 3:
                    worker.line.send("return")
                    worker.process.join(HANG)

    with InferenceServer(double, transport):
        come_and_go()
        eventually(lambda: not transport.connections.connections)
        before = descriptors()
        for _ in range(3):
            come_and_go()
        eventually(lambda: not transport.connections.connections and descriptors() <= before)


# -- a child of the server's process that ends as any program does -------------------------------------------

PROGRAM = """
import os, sys
import torch
from aioinfer import InferenceServer, MPTransport, ThreadingTransport
from aioinfer.testing import double, request
from tests.transports import process_slots

torch.set_num_threads(1)
server = InferenceServer(double, MAKE()).start()
client = server.client()
client(request(1), 20)
pid = os.fork()
if pid == 0:
    sys.exit(0)
os.waitpid(pid, 0)
print(float(client(request(2), 20)["action"][0]), flush=True)
server.shutdown()
"""


@pytest.mark.parametrize("make", ["ThreadingTransport", "MPTransport", "process_slots"])
def test_a_forked_child_of_the_servers_process_that_exits_leaves_the_server_alone(make: str, tmp_path: Path) -> None:
    code = tmp_path / "program.py"
    code.write_text(PROGRAM.replace("MAKE", make))
    with running(code) as program:
        assert program.stdout.read() == "4.0\n", program.errors


# -- the end of the server's process, as a child of it sees it -----------------------------------------------

DYING = """
import multiprocessing, os, sys, threading
import torch
from aioinfer import InferenceServer, MPTransport, connect
from aioinfer.testing import double, request
from tests.process_workers import clients_of, outcome
from tests.transports import process_slots

def model(td):
    if (td["observation"] < 0).any():
        os.kill(os.getpid(), 9)
    return double(td)

if __name__ == "__main__":
    torch.set_num_threads(1)
    transport = MAKE()
    server = InferenceServer(model, transport).start()
    (client,) = clients_of(transport, 1, blocking=BLOCKING)
    outcome(client, 1)
    if os.fork() == 0:
        print(outcome(client, 2), flush=True)
        print(outcome(client, -1), flush=True)
        print(outcome(client, 3), flush=True)
        os._exit(0)
    threading.Event().wait()
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", ["MPTransport", "process_slots"])
def test_a_forked_child_sees_the_servers_process_die(make: str, kind: str, tmp_path: Path) -> None:
    code = tmp_path / "program.py"
    code.write_text(DYING.replace("MAKE", make).replace("BLOCKING", str(kind == "blocking")))
    with running(code) as program:
        said = program.stdout.read()
    before, at_its_death, afterwards = said.splitlines()
    assert before == "4.0"
    assert at_its_death == "PeerDiedError: the server's process is gone"
    # A process that connects while the server is being taken down may still find it.
    assert afterwards.startswith(("PeerDiedError: ", "ServerClosedError: "))
