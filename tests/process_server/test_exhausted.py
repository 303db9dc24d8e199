"""Servers in processes of their own: when descriptors run out, processes are killed, or talk nonsense."""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from aioinfer import (
    InferenceError,
    MPTransport,
    PeerDiedError,
    ProcessInferenceServer,
    ServerClosedError,
    ServerNotRunningError,
    ServerStartError,
    WeightSyncError,
)
from aioinfer.ipc.sockets import connect_unix
from aioinfer.testing import eventually, request
from aioinfer.testing.callers import is_double
from tests import hosted
from tests.effort import Effort
from tests.hosted import forked, kill, make_double, make_policy, slots
from tests.leftovers import needs_descriptors
from tests.limits import HANG
from tests.methods import SPAWN
from tests.weight_models import mark_of, policy

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

DESCRIPTORS = "/proc/self/fd"


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may open ``count`` descriptors more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir(DESCRIPTORS)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 64, before[1]))
    fillers: list[int] = []
    try:
        with suppress(OSError):
            while True:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
        for filler in fillers[:count]:
            os.close(filler)
        del fillers[:count]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for filler in fillers:
            os.close(filler)


def is_hung_up(caller: socket.socket) -> bool:
    caller.settimeout(HANG)
    try:
        return not caller.recv(1)
    except ConnectionResetError:
        return True


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir(DESCRIPTORS))


@needs_descriptors
@pytest.mark.usefixtures("only_new_garbage")
@pytest.mark.parametrize("method", ["fork", SPAWN])
def test_a_start_that_runs_out_of_descriptors_leaves_none_and_tells_its_callers(method: str) -> None:
    def attempt(left: int) -> bool:
        """Say whether there was a process."""
        ways = [MPTransport(), slots()]
        server = ProcessInferenceServer(make_policy, ways, ctx=method)
        callers = [connect_unix(way.address) for way in ways]  # clients would need descriptors too
        with suppress(ServerStartError), descriptors_left(left):
            server.start()
        if not server.is_alive:
            assert all(map(is_hung_up, callers))
            for way in ways:
                with pytest.raises(ServerClosedError):
                    way.client()(request(0), HANG)
            with pytest.raises(ServerNotRunningError):
                server.stats()
        for caller in callers:
            caller.close()
        server.shutdown()
        return server.pid is not None

    with ProcessInferenceServer(make_policy, MPTransport(), ctx=method):  # what multiprocessing keeps is there
        pass
    before = open_descriptors()
    left = 0
    while not attempt(left):
        left += 1
        gc.collect()  # else what the last one left would be freed while the next one looks for descriptors
    assert left > 3
    eventually(lambda: open_descriptors() <= before)


@needs_descriptors
def test_calls_that_find_no_descriptor_leave_the_server_as_it_was() -> None:
    with forked(make_policy) as server:
        client = server.client()
        assert mark_of(client(request(0), HANG)) == 0
        for left in range(6):
            with descriptors_left(left):
                assert server.health(HANG).ready
                with server.paused():
                    assert server.stats().pending == 0
                with suppress(OSError, WeightSyncError):
                    server.update_weights(policy(1.0, size=500 + left))  # new memory for each, refused if it gets there
        server.update_weights(policy(2.0))
        assert mark_of(client(request(0), HANG)) == 2


@needs_descriptors
def test_a_process_that_finds_no_descriptor_refuses_the_weights_and_takes_the_next() -> None:
    with forked(hosted.Exhausted) as server:
        client = server.client()
        client(request(1), HANG)
        with pytest.raises(WeightSyncError, match="the weights did not arrive"):
            server.update_weights(hosted.Exhausted())
        assert server.health(HANG).ready
        assert client(request(0), HANG)["freed"].item()
        server.update_weights(hosted.Exhausted())
        assert server.policy_version == 1


@pytest.mark.parametrize("method", ["fork", SPAWN])
def test_a_process_that_is_killed_at_any_moment_is_missed_by_name(method: str, effort: Effort) -> None:
    rng = effort.random()
    before = open_descriptors()
    for _ in range(effort.times(8, stress=30) if method == "fork" else 2):
        kill_at_any_moment(method, rng)
    eventually(lambda: open_descriptors() <= before + 2)  # what multiprocessing keeps


def kill_at_any_moment(method: str, rng: random.Random) -> None:
    server = ProcessInferenceServer(make_policy, MPTransport(), ctx=method)
    killer = threading.Thread(target=kill_after, args=(server, rng.uniform(0, 0.08 if method == "fork" else 3.0)))
    killer.start()
    with ThreadPoolExecutor(len(CALLS)) as pool, suppress(ServerStartError):
        server.start()
        for future in [pool.submit(call_until_it_raises, call, server) for call in CALLS.values()]:
            assert isinstance(future.result(HANG), (PeerDiedError, ServerNotRunningError, ServerClosedError))
    killer.join()
    eventually(lambda: not server.is_alive)
    health = server.health()
    assert (health.exit_code, "SIGKILL" in health.reason or "shut down" in health.reason) == (-signal.SIGKILL, True)
    server.shutdown()


def kill_after(server: ProcessInferenceServer, seconds: float) -> None:
    eventually(lambda: server.pid is not None)
    time.sleep(seconds)
    kill(server)


def call_until_it_raises(call: Callable[[ProcessInferenceServer], object], server: ProcessInferenceServer) -> Exception:
    while True:
        try:
            call(server)
        except InferenceError as error:
            return error


def pause(server: ProcessInferenceServer) -> None:
    with server.paused("wait"):
        pass


CALLS: dict[str, Callable[[ProcessInferenceServer], object]] = {
    "stats": lambda server: server.stats(),
    "update": lambda server: server.update_weights(policy(1.0)),
    "pause": pause,
    "request": lambda server: server.client()(request(0), HANG),
}


UNKNOWN = (7 << 60 | 1 << 63).to_bytes(8, "little") + bytes(8)  # a kind of message that there is not


@pytest.mark.parametrize("nonsense", [UNKNOWN, UNKNOWN * 100], ids=["once", "often"])
def test_a_process_that_talks_nonsense_is_ended(nonsense: bytes) -> None:
    server = forked(hosted.Babbler(nonsense)).start()
    with suppress(InferenceError):
        server.client()(request(0), HANG)  # it says it before it answers
    eventually(lambda: not server.is_alive)
    assert "killed" in server.health().reason
    for call in (server.stats, lambda: server.update_weights(policy())):
        with pytest.raises(PeerDiedError):
            call()
    server.shutdown()


def test_a_process_that_closes_its_connection_is_ended() -> None:
    server = forked(hosted.Babbler(b"")).start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.client(), request(0), HANG)
        eventually(lambda: not server.is_alive)
        assert asked.exception(HANG) is not None or is_double(asked.result(), 0)
    with pytest.raises(PeerDiedError):
        server.stats()
    server.shutdown()


def test_a_server_of_a_finished_start_is_no_garbage_until_its_end() -> None:
    server = forked(make_double).start()
    pid, client = server.pid, server.client()
    del server
    gc.collect()
    assert is_double(client(request(1), HANG), 1)
    os.kill(pid or 0, signal.SIGKILL)
    assert client.submit(request(1)).exception(HANG) is not None
