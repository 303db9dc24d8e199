"""Servers in processes of their own run no forward pass while they are paused."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest

from aioinfer import (
    MPTransport,
    PeerDiedError,
    ProcessInferenceServer,
    ServerClosedError,
    ServerNotRunningError,
    ServerPausedError,
)
from aioinfer.testing import eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import has_pending_command
from aioinfer.transports.ipc.server import ProcessTransport
from tests.hosted import Gated, forked, freeze, kill, make_double, make_policy, slots
from tests.limits import HANG
from tests.process_workers import hear
from tests.weight_models import mark_of, policy

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

WAYS: tuple[Literal["keep", "wait", "reject"], ...] = ("keep", "wait", "reject")


@pytest.fixture(params=[MPTransport, slots], ids=["mp", "slots"])
def transport(request: pytest.FixtureRequest) -> ProcessTransport:
    return request.param()  # type: ignore[no-any-return]


def test_pending_requests_are_kept_until_the_server_goes_on(transport: ProcessTransport) -> None:
    with ProcessInferenceServer(make_policy, transport, ctx="fork") as server:
        with server.paused():
            asked = [client.submit(request(0)) for client in server.clients(5)]
            eventually(lambda: server.stats().pending == 5)
            assert not server.stats().batches
            server.update_weights(policy(3.0))
            assert not any(future.done() for future in asked)
        assert {mark_of(future.result(HANG)) for future in asked} == {3.0}
        assert sum(server.stats().batches.values()) == 1


def test_pending_requests_are_served_first_where_that_is_asked_for(tmp_path: Path) -> None:
    model = Gated(tmp_path)
    with forked(model, max_batch_size=2) as server, ThreadPoolExecutor(1) as pool:
        asked = [server.client().submit(request(0))]
        eventually(model.entered.exists)
        asked += [server.client().submit(request(value)) for value in range(1, 5)]
        eventually(lambda: server.stats().pending == 4)
        inside, leave = threading.Event(), threading.Event()

        def pause() -> list[bool]:
            with server.paused(pending="wait"):
                inside.set()
                done = [is_double(future.result(HANG), value) for value, future in enumerate(asked)]
                assert leave.wait(HANG)
                return done

        pausing = pool.submit(pause)
        assert not inside.wait(0.05)  # the pass that runs, and those to come, are not over
        model.gate.touch()
        assert inside.wait(HANG)
        late = server.client().submit(request(9))
        eventually(lambda: server.stats().pending == 1)
        leave.set()
        assert all(pausing.result(HANG))
        assert is_double(late.result(HANG), 9)


def test_pending_requests_are_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    model = Gated(tmp_path)
    with forked(model) as server, ThreadPoolExecutor(1) as pool:
        caller = server.client()
        model.gate.touch()
        for _ in range(2):  # with the second reply, it knows that it is accepted
            caller(request(0), HANG)
        model.gate.unlink()
        model.entered.unlink()
        running = caller.submit(request(0))
        eventually(model.entered.exists)
        asked = [server.client().submit(request(value)) for value in range(1, 4)]
        eventually(lambda: server.stats().pending == 3)
        leave = threading.Event()

        def pause() -> None:
            with server.paused(pending="reject"):
                assert leave.wait(HANG)

        pausing = pool.submit(pause)
        client = server.client()
        eventually(lambda: has_pending_command(server))
        assert server.health(HANG).ready  # the process has been asked to pause before
        with pytest.raises(ServerPausedError):
            client(request(4), HANG)
        model.gate.touch()
        for future in asked:
            with pytest.raises(ServerPausedError):
                future.result(HANG)
        assert is_double(running.result(HANG), 0)
        leave.set()
        pausing.result(HANG)
        assert is_double(client(request(5), HANG), 5)  # at once


async def test_a_pause_can_be_awaited_and_nested_and_several_overlap() -> None:
    async with forked(make_double) as server:
        client = server.async_client()
        first, second = server.paused(), server.paused("wait")
        async with server.paused("reject"):
            await first.__aenter__()
            await second.__aenter__()
            with pytest.raises(ServerPausedError):
                await client(request(1))
        asked = client.submit(request(1))
        await asyncio.to_thread(eventually, lambda: server.stats().pending == 1)
        await first.__aexit__(None, None, None)
        assert (await server.ahealth(HANG)).ready
        assert not asked.done()
        await second.__aexit__(None, None, None)
        assert is_double(await asyncio.wait_for(asked, HANG), 1)
        with first, first:  # a pause may be used again, and inside itself
            pass
        assert is_double(await asyncio.wait_for(client(request(2)), HANG), 2)


@pytest.mark.parametrize("pending", WAYS)
async def test_a_pause_that_is_cancelled_while_it_begins_leaves_nothing_behind(pending: Any, tmp_path: Path) -> None:
    model = Gated(tmp_path)
    async with forked(model) as server:
        asked = server.async_client().submit(request(1))
        await asyncio.to_thread(eventually, model.entered.exists)

        async def pause() -> None:
            async with server.paused(pending):
                raise AssertionError("it can't have begun")

        pausing = asyncio.ensure_future(pause())
        await server.ahealth(HANG)  # the process has been asked
        pausing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pausing
        await server.ahealth(HANG)  # and told that it need not
        late = server.async_client().submit(request(2))
        model.gate.touch()
        assert is_double(await asked, 1)
        if pending == "reject":  # the process may have refused it before it was told
            await asyncio.wait([late])
            late.exception()
        else:
            assert is_double(await asyncio.wait_for(late, HANG), 2)
        assert is_double(await asyncio.wait_for(server.async_client()(request(3)), HANG), 3)


async def test_a_pause_that_is_cancelled_while_it_ends_has_ended() -> None:
    async with forked(make_double) as server:

        async def pause() -> None:
            async with server.paused("reject"):
                task = asyncio.current_task()
                assert task is not None
                freeze(server)  # so that it does not answer first
                asyncio.get_running_loop().call_soon(task.cancel)  # where the block is left

        with pytest.raises(asyncio.CancelledError):
            await asyncio.ensure_future(pause())
        assert server.pid is not None
        os.kill(server.pid, signal.SIGCONT)
        await server.ahealth(HANG)
        assert is_double(await asyncio.wait_for(server.async_client()(request(1)), HANG), 1)


def test_a_pause_whose_object_is_forgotten_ends() -> None:
    with forked(make_double) as server:
        server.paused().__enter__()
        assert is_double(server.client()(request(1), HANG), 1)


@pytest.mark.parametrize("pending", WAYS)
@pytest.mark.parametrize("end", ["shut down", "killed"])
def test_a_server_may_end_while_it_is_paused(pending: Any, end: str) -> None:
    server = forked(make_double).start()
    with server.paused(pending):
        asked = server.client().submit(request(1))
        if end == "killed":
            kill(server)
            eventually(lambda: not server.is_alive)
        else:
            server.shutdown()
        assert asked.exception(HANG) is not None
    with pytest.raises(PeerDiedError if end == "killed" else ServerNotRunningError), server.paused(pending):
        raise AssertionError("it can't have begun")
    server.shutdown()


@pytest.mark.parametrize("end", [ServerClosedError, PeerDiedError])
def test_a_pause_that_has_not_begun_when_the_server_ends_says_so(end: type[Exception], tmp_path: Path) -> None:
    model = Gated(tmp_path)
    server = forked(model).start()
    server.client().submit(request(0))
    eventually(model.entered.exists)

    def pause() -> None:
        with server.paused():
            raise AssertionError("it can't have begun")

    with ThreadPoolExecutor(1) as pool:
        pausing = pool.submit(pause)
        eventually(lambda: has_pending_command(server))
        if end is PeerDiedError:
            kill(server)
        else:
            server.shutdown(0.0)
        with pytest.raises(end):
            pausing.result(HANG)
    server.shutdown()


def test_pauses_of_many_threads_leave_the_server_open() -> None:
    with forked(make_double) as server, ThreadPoolExecutor(8) as pool:

        def pause() -> None:
            for _ in range(30):
                with server.paused("reject"):
                    pass

        for pausing in [pool.submit(pause) for _ in range(8)]:
            pausing.result(HANG)
        assert is_double(server.client()(request(1), HANG), 1)


def test_bad_ways_to_pause_are_refused() -> None:
    server = forked(make_double)
    with pytest.raises(ServerNotRunningError, match="it was not started"):
        server.paused()
    with server, pytest.raises(ValueError, match='"keep", "wait" or "reject"'):
        server.paused("abort")  # type: ignore[arg-type]


VERBS: dict[str, Callable[[ProcessInferenceServer], object]] = {
    "start": lambda server: server.start(),
    "astart": lambda server: asyncio.run(server.astart()),
    "stats": lambda server: server.stats(),
    "astats": lambda server: asyncio.run(server.astats()),
    "health": lambda server: server.health(),
    "ahealth": lambda server: asyncio.run(server.ahealth()),
    "update_weights": lambda server: server.update_weights(policy()),
    "aupdate_weights": lambda server: asyncio.run(server.aupdate_weights(policy())),
    "paused": lambda server: server.paused(),
}


@pytest.mark.parametrize("started", [False, True])
def test_a_forked_child_of_the_parent_is_told_at_once_whatever_it_calls(started: bool) -> None:
    server = forked(make_policy, policy_version=4)

    if started:
        server.start()
    with server.paused() if started else nullcontext() as pausing:

        def child(line: Connection[Any, Any]) -> None:
            told = []
            for call in VERBS.values():
                try:
                    call(server)
                except Exception as error:
                    told.append((type(error), str(error)))
            if pausing is not None:
                pausing.__exit__(None, None, None)
            server.shutdown()
            asyncio.run(server.aclose())
            line.send((told, server.policy_version, server.is_alive))

        context = multiprocessing.get_context("fork")
        line, other = context.Pipe()
        process = context.Process(target=child, args=(other,))
        process.start()
        try:
            told, version, alive = hear(line)
        finally:
            process.join()
            line.close()
        assert [kind for kind, _ in told] == [ServerNotRunningError] * len(VERBS)
        assert {text for _, text in told} == {
            f"process {os.getpid()} has made the server, this is process {process.pid}; hand clients over"
        }
        assert (version, alive) == (4, False)
    if started:
        assert server.health(HANG).ready
        assert mark_of(server.client()(request(0), HANG)) == 0
    server.shutdown()
