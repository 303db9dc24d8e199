"""Servers in processes of their own: what they are made with, and how they begin and end beside their callers."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
import torch
from tensordict import TensorDict

from aioinfer import (
    InferenceServer,
    MPTransport,
    PeerDiedError,
    ProcessInferenceServer,
    ProcessSlotTransport,
    ServerClosedError,
    ServerStartError,
    WeightSyncError,
)
from aioinfer.testing import eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import weight_sender_of
from aioinfer.transports.ipc.server import ProcessTransport
from tests import hosted
from tests.hosted import forked, make_double, make_policy, slots, worker
from tests.limits import HANG
from tests.methods import METHODS
from tests.process_workers import hear
from tests.weight_models import SCHEMES, mark_of, policy

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


# -- what is checked where it is given ---------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown name": ({"batch": 3}, TypeError, "unexpected keyword argument 'batch'"),
    "no batch at all": ({"max_batch_size": 0}, ValueError, "max_batch_size=0"),
    "a batch of a kind": ({"max_batch_size": "64"}, TypeError, "max_batch_size must be an integer, got '64'"),
    "a negative wait": ({"timeout": -1.0}, ValueError, "timeout must be at least 0"),
    "no room": ({"max_pending": 0}, ValueError, "max_pending must be an integer of at least 1"),
    "a long version": ({"policy_version": 2**63}, ValueError, "64 bits"),
    "no version": ({"policy_version": "1"}, TypeError, "version must be an integer"),
    "no scheme": ({"weight_sync": 3}, TypeError, "weight_sync must be a WeightSyncScheme, got int"),
    "no function": ({"collate_fn": 3}, TypeError, "collate_fn must be callable, got int"),
    "no device": ({"device": "abacus"}, RuntimeError, "abacus"),
}


@pytest.mark.parametrize("what", WRONG)
def test_options_are_checked_where_they_are_given(what: str) -> None:
    options, kind, message = WRONG[what]
    with pytest.raises(kind, match=message):
        ProcessInferenceServer(make_double, MPTransport(), **options)


def test_arguments_are_checked_where_they_are_given() -> None:
    for model in (torch.nn.Linear(1, 1), policy()):
        with pytest.raises(TypeError, match=r"a function that makes the model.*`lambda: model`"):
            ProcessInferenceServer(model, MPTransport())
    transport = MPTransport()
    for wrong in ([], [transport, transport]):
        with pytest.raises(ValueError, match="at least one transport, and none twice"):
            ProcessInferenceServer(make_double, wrong)
    with pytest.raises(TypeError, match="startup_timeout must be a number"):
        ProcessInferenceServer(make_double, MPTransport(), startup_timeout="2")  # type: ignore[arg-type]
    assert ProcessInferenceServer(make_double, MPTransport()).max_batch_size == 64
    assert ProcessInferenceServer(make_double, MPTransport(), max_batch_size=7).max_batch_size == 7


# -- transports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_callers_of_several_transports_meet_in_one_server(method: str) -> None:
    ways = [slots(), MPTransport()]
    with ProcessInferenceServer(make_policy, ways, ctx=method) as server:
        assert (server.transport, server.transports) == (ways[0], ways)
        server.update_weights(policy(2.0))
        with server.paused():
            asked = [way.client().submit(request(0)) for way in ways]
            eventually(lambda: server.stats().pending == 2)
        assert {mark_of(future.result(HANG)) for future in asked} == {2.0}
        assert sum(server.stats().batches.values()) == 1
        for way in ways:
            with worker(way.address) as line:
                assert hear(line) == 2
    for way in ways:
        with pytest.raises(ServerClosedError):
            way.client()(request(0), HANG)


def test_a_server_takes_all_of_its_transports_or_none() -> None:
    free, used = MPTransport(), MPTransport()
    with InferenceServer(make_double(), used):
        refused = ProcessInferenceServer(make_double, [free, used], ctx="fork")
        with pytest.raises(RuntimeError, match="in use already"):
            refused.start()
        asked = free.client().submit(request(3))
        refused.shutdown()
        with pytest.raises(ServerClosedError):
            asked.result(HANG)
        assert is_double(used.client()(request(1), HANG), 1)  # the other server's callers have nothing to do with it


def test_a_transport_outlives_a_server_that_never_started() -> None:
    transport = MPTransport()
    ProcessInferenceServer(make_double, transport).shutdown()
    with ProcessInferenceServer(make_double, transport, ctx="fork") as server:
        assert is_double(server.client()(request(1), HANG), 1)


def lent() -> ProcessSlotTransport:
    return ProcessSlotTransport(request(0), TensorDict({"action": torch.zeros(3)}), num_slots=8)


@pytest.mark.parametrize("make", [MPTransport, lent])
async def test_clients_lend_replies_where_that_is_asked_for(make: Callable[[], ProcessTransport]) -> None:
    async with ProcessInferenceServer(make_double, make(), ctx="fork") as server:
        for blocking in (server.client(copy=False), *server.clients(2, copy=False)):
            assert is_double(await asyncio.to_thread(blocking, request(2), HANG), 2)
        for awaited in (server.async_client(copy=False), *server.async_clients(2, copy=False)):
            assert is_double(await awaited(request(2)), 2)


# -- an end before the start -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["shutdown", "aclose"])
async def test_requests_to_a_server_that_never_starts_end_with_it(end: str) -> None:
    ways = [MPTransport(), slots()]
    server = ProcessInferenceServer(make_double, ways)
    clients = [way.client() for way in ways]
    asked = [client.submit(request(1)) for client in clients]
    ways[0].queue.pending()  # which takes its caller in
    awaited = asyncio.ensure_future(server.async_client()(request(2)))
    await asyncio.sleep(0)
    if end == "aclose":
        with anyio.CancelScope() as scope:
            scope.cancel()
            await server.aclose()  # which happens all the same
    else:
        server.shutdown()
    for future in asked:
        with pytest.raises(ServerClosedError):
            await asyncio.to_thread(future.result, HANG)
    with pytest.raises(ServerClosedError):
        await asyncio.wait_for(awaited, HANG)
    await server.aclose()
    for client in (*clients, *[way.client() for way in ways]):
        with pytest.raises(ServerClosedError):
            client(request(3), HANG)
    with pytest.raises(ServerClosedError, match="shut down before it started; make another server"):
        server.start()
    with pytest.raises(ServerClosedError, match="shut down before it started; make another server"):
        await server.astart()
    health = server.health()
    assert (health.alive, health.ready, health.reason) == (False, False, "the server is shut down")


def test_a_server_of_which_two_threads_want_the_start_starts_once() -> None:
    for _ in range(5):
        server = forked(make_double)
        with ThreadPoolExecutor(4) as pool:
            starts = [pool.submit(server.start) for _ in range(4)]
            errors = [start.exception(HANG) for start in starts]
        assert sum(error is None for error in errors) == 1
        assert is_double(server.client()(request(1), HANG), 1)
        server.shutdown()


# -- the version -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_version_is_known_without_asking_the_process(method: str) -> None:
    scheme, source = SCHEMES[0](num_workers=1), policy(1.0)
    server = ProcessInferenceServer(make_policy, MPTransport(), ctx=method, policy_version=5, weight_sync=scheme)
    assert server.policy_version == 5
    with server:
        assert server.policy_version == 5
        server.update_weights(policy(1.0))
        assert server.policy_version == 6
        server.update_weights(policy(1.0), version=-(2**63))
        assert server.policy_version == -(2**63)
        scheme.init_on_sender(model=source)
        scheme.connect(version=10, timeout=HANG)  # the trainer's doing, not the parent's
        hosted.freeze(server)  # it can't be asked
        assert server.policy_version == 10
        hosted.kill(server)
        eventually(lambda: not server.is_alive)
        assert server.policy_version == 10
    assert server.policy_version == 10
    scheme.shutdown()


# -- busy threads ------------------------------------------------------------------------------------------


@pytest.fixture
async def busy_threads() -> Any:
    """Every thread that anyio has for everybody is busy, as those of a web backend may be."""
    leave = threading.Event()
    limiter = anyio.to_thread.current_default_thread_limiter()
    held = [asyncio.ensure_future(anyio.to_thread.run_sync(leave.wait, HANG)) for _ in range(int(limiter.total_tokens))]
    while limiter.available_tokens:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0)
    yield
    leave.set()
    await asyncio.gather(*held)


@pytest.mark.usefixtures("busy_threads")
async def test_busy_threads_of_the_program_hold_nothing_up() -> None:
    async with asyncio.timeout(HANG / 2):
        server = forked(make_policy)
        await server.astart()
        await server.aupdate_weights(policy(1.0))
        async with server.paused():
            assert (await server.ahealth(HANG)).ready
        assert (await server.astats()).weight_updates == 1
        await server.aclose()
        await forked(make_policy).aclose()
    assert not server.is_alive


# -- what users' classes raise -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, hosted.Mute])
def test_whatever_a_factory_raises_the_parent_hears_its_name(kind: type[BaseException]) -> None:
    with pytest.raises(ServerStartError, match=kind.__name__):
        forked(hosted.Raises(kind)).start()


def test_whatever_unpickling_a_factory_raises_the_parent_hears_its_name() -> None:
    with pytest.raises(ServerStartError, match="SystemExit"):
        ProcessInferenceServer(hosted.Rude("opened"), MPTransport(), ctx="forkserver").start()


def test_whatever_pickling_a_factory_raises_the_parent_hears_its_name() -> None:
    server = ProcessInferenceServer(hosted.Rude("closed"), MPTransport())
    asked = server.client().submit(request(0))
    with pytest.raises(ServerStartError, match="SystemExit"):
        server.start()
    assert asked.exception(HANG) is not None
    assert not server.is_alive


@pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt", "CancelledError", "Mute", "Opened", "Closed"])
def test_whatever_a_module_raises_that_is_given_a_state_the_parent_hears_it(kind: str) -> None:
    with forked(hosted.Touchy) as server:
        with pytest.raises(Exception, match=f"{kind}|ModelError"):
            server.update_weights({"weight": torch.ones(1), "_extra_state": kind})
        server.update_weights({"weight": torch.ones(1), "_extra_state": "fine"})
        assert server.health(HANG).ready


def test_weights_that_do_not_reach_the_queue_leave_the_way_free_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with forked(make_policy) as server:
        with monkeypatch.context() as patch:
            patch.setattr(weight_sender_of(server).queue, "put", refuse)
            for _ in range(2):
                with pytest.raises(WeightSyncError, match="could not be sent: OSError: no room"):
                    server.update_weights(policy(1.0))
        server.update_weights(policy(2.0))
        assert mark_of(server.client()(request(0), HANG)) == 2


async def test_updates_that_wait_for_a_process_that_dies_all_hear_of_its_death(tmp_path: Path) -> None:
    async with forked(partial(hosted.GatedWeights, tmp_path)) as server:
        asked = server.async_client().submit(request(0))
        await asyncio.to_thread(eventually, (tmp_path / "entered").exists)
        updates = [asyncio.ensure_future(server.aupdate_weights({"weight": torch.ones(1)})) for _ in range(100)]
        await server.ahealth(HANG)
        hosted.kill(server)
        futures: list[asyncio.Future[Any]] = [asked, *updates]
        await asyncio.wait(futures, timeout=HANG)
        assert {type(future.exception()) for future in futures} == {PeerDiedError}


def refuse(message: object) -> None:
    raise OSError("no room")


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()
