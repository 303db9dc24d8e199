"""Servers in processes of their own: how they start, and what keeps them from it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aioinfer import (
    MPTransport,
    ProcessInferenceServer,
    ServerClosedError,
    ServerStartError,
    ThreadingTransport,
)
from aioinfer.ipc.selector import Selector, Source
from aioinfer.process_server.parent import ChildProcess
from aioinfer.testing import eventually, request
from aioinfer.weight_sync import NoWeightSyncScheme
from tests import hosted
from tests.hosted import HandsNothingOut, HandsOut, forked, kill, make_double, make_policy, slots
from tests.limits import HANG, IMPORTS
from tests.methods import SPAWN
from tests.programs import running
from tests.weight_models import mark, mark_of, policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.usefixtures("exits_by_itself"),
]

FAILURES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "the factory raises": (hosted.raise_error, {}, "in raise_error\n.*\nValueError: there are no weights"),
    "it raises what does not pickle": (hosted.raise_odd_error, {}, "Odd: 1 and 2"),
    "it leaves Python": (hosted.exit_python, {}, "SystemExit: enough"),
    "it makes no model": (hosted.return_none, {}, "policy_factory must return a model, .* got NoneType"),
    "the server refuses the model": (make_double, {"weight_sync": NoWeightSyncScheme()}, "Traceback.*nn.Module"),
    "the model can't be placed": (make_policy, {"device": "cuda:77"}, "Traceback.*Error"),
    "the process exits": (hosted.exit_at_once, {}, "exit code 3"),
    "the process is killed": (hosted.kill_itself, {}, "killed by SIGKILL"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_keeps_a_server_from_starting_is_known_at_once(failure: str) -> None:
    factory, options, expected = FAILURES[failure]
    server = forked(factory, **options)
    client = server.client()
    with pytest.raises(ServerStartError, match=f"(?s){expected}") as caught:
        server.start()
    if failure == "the factory raises":
        assert isinstance(caught.value.__cause__, ValueError)
    assert not server.is_alive
    assert not server.health().alive
    with pytest.raises(ServerClosedError):
        client(request(0), HANG)
    with pytest.raises(RuntimeError, match="does not run"):
        server.stats()


def test_a_process_that_exits_is_not_said_to_be_killed_where_its_handle_hears_of_that_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that reaps it does not run for longer than a process has to exit that has hung up."""
    unregister = Selector.unregister

    def pause_afterwards(selector: Selector, source: Source) -> None:
        unregister(selector, source)
        time.sleep(1.5)

    monkeypatch.setattr(Selector, "unregister", pause_afterwards)
    with pytest.raises(ServerStartError, match="exit code 3"):
        forked(hosted.exit_at_once).start()


SPAWN_FAILURES: dict[str, tuple[Any, str]] = {
    "it does not pickle": (lambda: None, "could not be started: .*lambda"),
    "it does not unpickle": (hosted.Unreadable(), "Traceback.*LookupError: made elsewhere"),
    "the process is killed": (hosted.kill_itself, "killed by SIGKILL"),
}


@pytest.mark.parametrize("method", ["forkserver", SPAWN])
@pytest.mark.parametrize("failure", SPAWN_FAILURES)
def test_what_keeps_a_spawned_server_from_starting_is_known_at_once(failure: str, method: str) -> None:
    factory, expected = SPAWN_FAILURES[failure]
    with pytest.raises(ServerStartError, match=f"(?s){expected}"):
        ProcessInferenceServer(factory, MPTransport(), ctx=method).start()


def test_a_process_that_dies_before_it_has_read_a_large_factory_is_no_hang() -> None:
    server = ProcessInferenceServer(HandsNothingOut(policy(0.0, size=10**6)), MPTransport())
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(server.start)
        eventually(lambda: server.pid is not None)
        kill(server)
        with pytest.raises(ServerStartError, match="killed by SIGKILL"):
            starting.result(HANG)


def test_an_interrupt_while_the_process_starts_does_not_reach_it_nor_do_later_changes_of_the_factory() -> None:
    factory = HandsOut(policy(1.0))
    server = ProcessInferenceServer(factory, slots())
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(server.start)
        try:
            eventually(lambda: server.pid is not None)
            os.kill(server.pid or 0, signal.SIGINT)
            assert starting.result(IMPORTS).health(HANG).ready
            mark(factory.module, 2.0)
            assert mark_of(server.client()(request(0), HANG)) == 1
        finally:
            server.shutdown()


class Sigint:
    """What a process does at SIGINT as it unpickles this."""

    def __reduce__(self) -> Any:
        return signal.getsignal, (signal.SIGINT,)


def test_a_child_of_a_fork_server_ignores_interrupts_before_it_unpickles_what_it_is_to_run() -> None:
    context = multiprocessing.get_context("forkserver")
    line, other = context.Pipe()
    with line, other:
        process = ChildProcess(context, other.send, (Sigint(),))
        process.reap()
        assert line.poll()
        assert line.recv() == signal.SIG_IGN


FORK_SERVER = """
import multiprocessing, signal, time

def tell():
    print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)

if __name__ == "__main__":
    from aioinfer.process_server.parent import ChildProcess

    context = multiprocessing.get_context("forkserver")
    ChildProcess(context, time.sleep, (0,)).reap()
    process = context.Process(target=tell)
    process.start()
    process.join()
"""


def test_other_processes_of_a_fork_server_that_a_server_has_started_hear_interrupts(tmp_path: Path) -> None:
    code = tmp_path / "program.py"
    code.write_text(FORK_SERVER)
    with running(code) as program:
        assert program.stdout.read() == "set()\n", program.errors


async def test_a_start_that_takes_too_long_or_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    factory = partial(hosted.take_for_ever, begun)
    late = forked(factory, startup_timeout=0.2)
    with pytest.raises(TimeoutError, match=r"does not serve within 0\.2 seconds"):
        await late.astart()
    assert not late.is_alive
    begun.unlink(missing_ok=True)
    unborn = forked(factory)
    starting = asyncio.ensure_future(unborn.astart())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not unborn.is_alive
    begun.unlink(missing_ok=True)
    for end in ("cancel", "shutdown"):
        server = forked(factory)
        assert not server.health().alive
        starting = asyncio.ensure_future(server.astart())
        await asyncio.to_thread(eventually, begun.exists)
        health = await server.ahealth()
        assert (health.alive, health.ready, health.reason) == (True, False, "the server starts")
        if end == "cancel":
            starting.cancel()
        else:
            await server.aclose()
        with pytest.raises(asyncio.CancelledError if end == "cancel" else ServerClosedError):
            await starting
        assert not server.is_alive
        begun.unlink()


def test_a_server_starts_once_and_only_with_a_transport_that_can_be_given_away() -> None:
    with forked(make_double) as server, pytest.raises(RuntimeError, match="make another server"):
        server.start()
    with pytest.raises(RuntimeError, match="make another server"):
        server.start()
    with pytest.raises(RuntimeError, match="in use already"):
        ProcessInferenceServer(make_double, server.transports[0]).start()
    for wrong in (ThreadingTransport(), [MPTransport(), ThreadingTransport()]):
        with pytest.raises(TypeError, match="whose callers may be in other processes"):
            ProcessInferenceServer(make_double, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy_factory must be callable, got int"):
        ProcessInferenceServer(3, MPTransport())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ctx must be .*, got int"):
        ProcessInferenceServer(make_double, MPTransport(), ctx=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="startup_timeout must be above 0"):
        ProcessInferenceServer(make_double, MPTransport(), startup_timeout=0)
    with pytest.raises(ValueError, match="clone"):
        ProcessInferenceServer(make_double, MPTransport(), ctx="clone")
