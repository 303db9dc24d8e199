"""Servers in processes of their own: how they end, and what is left of them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch

from aioinfer import PeerDiedError, ProcessInferenceServer, ServerClosedError, ServerNotRunningError, ServerStartError
from aioinfer.process_server import parent
from aioinfer.process_server.parent import inherited_fds
from aioinfer.testing import eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import connection_of, has_pending_command
from aioinfer.transports.ipc.protocol import State
from tests import hosted
from tests.hosted import Gated, Stuck, forked, freeze, kill, make_double, make_policy, worker
from tests.leftovers import (
    assert_no_descriptor_stays,
    assert_no_memory_stays,
    go_on,
    is_there,
    needs_descriptors,
)
from tests.limits import HANG
from tests.process_workers import hear
from tests.programs import running
from tests.weight_models import policy

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.mark.usefixtures("exits_by_itself")
async def test_a_server_that_is_shut_down_again_and_again_says_so() -> None:
    server = forked(make_double, policy_version=7)
    async with server:
        assert is_double(await server.async_client()(request(3)), 3)
    server.shutdown()
    await server.aclose()
    health = server.health()
    assert (health.alive, health.exit_code, health.reason) == (False, 0, "the server is shut down")
    assert server.policy_version == 7
    for ask in (server.stats, lambda: server.update_weights(policy()), server.paused):
        with pytest.raises(ServerNotRunningError, match="the server is shut down"):
            ask()
    with pytest.raises(ServerClosedError):
        server.client()(request(1), HANG)
    forked(make_double).start().shutdown(0.0)
    with anyio.CancelScope() as scope:
        async with forked(make_double) as server:
            scope.cancel()
            await anyio.sleep(1000)
    await asyncio.to_thread(eventually, lambda: not server.is_alive)
    server.shutdown()


@needs_descriptors
def test_servers_leave_no_descriptor_and_no_process_behind() -> None:
    def cycle() -> None:
        with forked(make_policy) as server:
            server.update_weights(policy(1.0))
            server.client()(request(1), HANG)
        with pytest.raises(ServerStartError):
            forked(hosted.raise_error).start()

    assert_no_descriptor_stays(cycle, 5)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("draining", [False, True])
def test_pending_requests_fail_or_are_served_before_the_end(draining: bool, tmp_path: Path) -> None:
    model = Gated(tmp_path)
    server = forked(model, max_batch_size=1).start()
    clients = server.clients(4)
    replies = [client.submit(request(0)) for client in clients]
    eventually(lambda: server.stats().pending == 3)
    connection = connection_of(clients[0])
    assert connection is not None
    status = connection.status
    assert status is not None
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(server.shutdown, HANG, drain=draining)
        eventually(lambda: status.view[0] == State.CLOSED)
        if not draining:
            wait(replies[1:], HANG)  # they fail at once, while the first one is computed
        model.gate.touch()
        ending.result(2 * HANG)
    answered = [reply.exception(HANG) is None for reply in replies]
    assert answered == ([True] * 4 if draining else [True, False, False, False])
    assert isinstance(replies[3].exception(), (ServerClosedError, type(None)))


@pytest.mark.parametrize("ending", ["shut down", "frozen", "killed"])
async def test_whatever_waits_for_a_stuck_model_hears_of_the_end(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ending == "shut down":  # its process ends by itself, however long that takes
        monkeypatch.setattr(parent, "EXIT_GRACE", HANG)
    server = forked(partial(Stuck, tmp_path / "entered"), max_batch_size=1).start()
    awaited = asyncio.ensure_future(server.async_client()(request(0)))
    blocked, unused = server.client(), server.client()
    with worker(server.client()) as one, worker(server.async_client()) as other, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(blocked, request(0), HANG)
        updating = pool.submit(server.update_weights, {"weight": torch.ones(1)})
        await asyncio.to_thread(eventually, lambda: server.stats().pending == 3)
        await asyncio.to_thread(eventually, lambda: has_pending_command(server))  # the update
        began = time.monotonic()
        if ending == "shut down":
            await server.aclose(0.1)
        elif ending == "frozen":
            freeze(server)
            await server.aclose(0.0)
        else:
            kill(server)
        expected = ServerClosedError if ending == "shut down" else PeerDiedError
        for future in (awaited, asyncio.wrap_future(waiting)):
            with pytest.raises(expected):
                await future
        assert {hear(one), hear(other)} == {expected.__name__}
        with pytest.raises(PeerDiedError if ending == "killed" else ServerClosedError):
            updating.result(HANG)
        assert time.monotonic() - began < HANG / 2
        eventually(lambda: not server.is_alive)
        health = server.health()
        assert (health.alive, health.exit_code) == (False, 0 if ending == "shut down" else -signal.SIGKILL)
        if ending == "killed":
            assert "killed by SIGKILL" in health.reason
            with pytest.raises(PeerDiedError, match="killed by SIGKILL"):
                await server.astats()
        with pytest.raises((PeerDiedError, ServerClosedError)):
            unused(request(0), HANG)
    server.shutdown()


def test_a_worker_that_died_leaves_a_process_that_says_why() -> None:
    with ProcessInferenceServer(make_double, hosted.BrokenTransport(), ctx="fork") as server:
        with pytest.raises(ServerClosedError, match="died of OSError: the wire broke"):
            server.client()(request(1), HANG)
        health = server.health(HANG)
        assert (health.alive, health.ready) == (True, False)
        assert "died of OSError: the wire broke" in health.reason


def test_a_process_that_another_thread_forks_meanwhile_does_not_hold_inherited_descriptors() -> None:
    begun, end = threading.Event(), threading.Event()
    reader, writer = os.pipe()

    def start() -> None:
        with inherited_fds(partial(os.close, writer)):
            begun.set()
            end.wait(HANG)

    thread = threading.Thread(target=start)
    thread.start()
    begun.wait(HANG)
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    other.start()
    end.set()
    thread.join()
    try:
        assert select.select([reader], [], [], HANG / 4)[0], "somebody holds the other end"
    finally:
        os.close(reader)
        other.kill()
        other.join()


# -- the end of programs -----------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, os, signal, sys, threading, time
from functools import partial
from pathlib import Path
from aioinfer import MPTransport, ProcessInferenceServer
from aioinfer.process_server import child, parent, server as handle
from aioinfer.testing import eventually
from tests.hosted import Note, Stuck, ask_once, make_policy, take_for_ever
from tests.limits import HANG

if "STATE" == "stuck":  # it exits by itself, after it has told its callers: however long that takes
    child.ORPHAN_GRACE = parent.EXIT_GRACE = handle.EXIT_TIMEOUT = HANG

if __name__ == "__main__":
    entered = Path(sys.argv[1])
    factory = {"idle": make_policy, "stuck": partial(Stuck, entered), "starting": partial(take_for_ever, entered)}
    server = ProcessInferenceServer(factory["STATE"], MPTransport(), ctx="METHOD")
    context = multiprocessing.get_context("METHOD")
    if "STATE" == "starting":
        threading.Thread(target=server.start, daemon=True).start()
        eventually(entered.exists)
    else:
        server.start()
    if "STATE" == "stuck":
        context.Process(target=ask_once, args=(Note(Path(sys.argv[2])), server.client(), 0.0)).start()
        eventually(entered.exists)
    stranger = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
    stranger.start()
    print(server.pid, stranger.pid, flush=True)
    sys.stdin.readline()
    END
"""

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
ENDS = {
    "it is killed while the server is idle": ("fork", "idle", KILLED),
    "it is killed while the server starts": ("fork", "starting", KILLED),
    "it is killed while the model is stuck": ("fork", "stuck", KILLED),
    "it is killed, with spawned processes": ("spawn", "stuck", KILLED),
    "it is interrupted, with all of its processes": ("fork", "idle", "os.killpg(0, signal.SIGINT); time.sleep(1000)"),
    "it forgets the server": ("fork", "stuck", ""),
}


OFTEN = {
    "it is killed while the server is idle",
    "it is interrupted, with all of its processes",
    "it forgets the server",
}


@pytest.mark.parametrize("end", [pytest.param(end, marks=[] if end in OFTEN else pytest.mark.stress) for end in ENDS])
def test_a_program_that_ends_leaves_no_process_and_no_memory(end: str, tmp_path: Path) -> None:
    method, state, ending = ENDS[end]
    program, note = tmp_path / "program.py", tmp_path / "note"
    program.write_text(PROGRAM.replace("METHOD", method).replace("STATE", state).replace("END", ending))
    with running(program, str(tmp_path / "entered"), str(note)) as process:
        said = process.stdout.readline().split()
        assert said, process.errors
        server, stranger = map(int, said)
        memory = go_on(process)
        process.wait(HANG)
        eventually(lambda: not is_there(server))  # though a process that was forked meanwhile lives
        with suppress(ProcessLookupError):
            os.kill(stranger, signal.SIGKILL)
        eventually(lambda: not is_there(-process.pid))
        assert "aioinfer-server" not in process.errors  # which a traceback of it would begin with
    if state == "stuck":  # a worker hears that it is a shutdown, and no death
        assert note.read_text() == "ServerClosedError"
    assert_no_memory_stays(memory)
