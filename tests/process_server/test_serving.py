"""Servers in processes of their own: what their handle does."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

from aioinfer import DispatchReason, Health, MPTransport, ProcessInferenceServer, WeightSyncError
from aioinfer.testing import request
from aioinfer.testing.inspection import weight_sender_of
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme
from tests.hosted import freeze, make_policy, slots, worker
from tests.limits import HANG
from tests.methods import METHODS
from tests.process_workers import hear
from tests.weight_models import SCHEMES, mark, mark_of, policy

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module", params=[("fork", MPTransport), ("spawn", slots)], ids=["fork-mp", "spawn-slots"])
def server(request: pytest.FixtureRequest) -> Iterator[ProcessInferenceServer]:
    """Tests that share it leave it as it is, but for its weights."""
    method, transport = request.param
    with ProcessInferenceServer(make_policy, transport(), ctx=method) as started:
        yield started


async def test_callers_of_all_processes_and_both_kinds_are_served(server: ProcessInferenceServer) -> None:
    server.update_weights(policy(1.0))
    for client in (server.client(), *server.clients(2)):
        assert mark_of(client(request(0), HANG)) == 1
    for awaited in (server.async_client(), *server.async_clients(2)):
        assert mark_of(await awaited(request(0))) == 1
    for anybody in (server.client(), server.async_client(), server.address):
        with worker(anybody) as line:
            assert hear(line) == 1


async def test_statistics_and_health_are_those_of_the_process(server: ProcessInferenceServer) -> None:
    server.stats(reset=True)
    server.client()(request(0), HANG)
    for stats in (server.stats(), await server.astats(reset=True)):
        assert (stats.ok, sum(stats.batches.values()), stats.policy_version) == (1, 1, server.policy_version)
    with pytest.raises(TypeError):
        stats.batches[DispatchReason.IDLE] = 3  # type: ignore[index]
    assert server.stats().ok == 0
    for health in (server.health(HANG), await server.ahealth(HANG)):
        assert (health.alive, health.ready, health.reason) == (True, True, "")
        assert (health.pid, health.pending, health.policy_version) == (server.pid, 0, server.policy_version)
    assert server.is_alive
    assert server.pid not in (None, os.getpid())


async def test_weights_are_in_use_when_an_update_returns(server: ProcessInferenceServer) -> None:
    client, version = server.client(), server.policy_version
    server.update_weights(policy(2.0))
    reply = client(request(0), HANG)
    assert (mark_of(reply), int(reply["policy_version"])) == (2, version + 1)
    source = policy(3.0)
    updating = asyncio.ensure_future(server.aupdate_weights(source.state_dict(), version=70))
    await asyncio.sleep(0)  # it has begun
    mark(source, -1.0)
    await updating
    reply = client(request(0), HANG)
    assert (mark_of(reply), int(reply["policy_version"])) == (3, 70)
    server.update_weights(policy(4.0).double(), cast=True)
    assert mark_of(client(request(0), HANG)) == 4
    wrong: tuple[Any, ...] = (policy(5.0).double(), policy(5.0, size=3), {})
    for weights in wrong:
        with pytest.raises(WeightSyncError):
            await server.aupdate_weights(weights)
    with pytest.raises(TypeError, match="got int"):
        server.update_weights(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64 bits"):
        server.update_weights(policy(5.0), version=2**63)
    assert (mark_of(client(request(0), HANG)), server.policy_version) == (4, 71)


async def test_updates_are_applied_in_their_order_however_many_wait(server: ProcessInferenceServer) -> None:
    updates = [server.aupdate_weights(policy(float(number)), version=number) for number in range(100, 140)]
    cancelled = asyncio.ensure_future(updates[0])
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(*updates[1:])
    reply = server.client()(request(0), HANG)
    assert (mark_of(reply), int(reply["policy_version"])) == (139, 139)
    assert len(refcounts(server)) <= 40
    server.update_weights(policy(140.0))
    assert not any(refcounts(server))


def refcounts(server: ProcessInferenceServer) -> list[int]:
    return [count for pool in weight_sender_of(server).pools for count in pool.refcounts]


def test_a_process_that_was_forked_from_the_parent_has_no_say(server: ProcessInferenceServer) -> None:
    def child(line: Connection[Any, Any]) -> None:
        try:
            server.stats()
        except RuntimeError as error:
            line.send(str(error))
        server.shutdown()

    context = multiprocessing.get_context("fork")
    line, other = context.Pipe()
    process = context.Process(target=child, args=(other,))
    process.start()
    assert f"this is process {process.pid}; hand clients over" in hear(line)
    process.join()
    line.close()
    assert server.health(HANG).ready
    with pytest.raises(TypeError, match="hand it clients"):
        pickle.dumps(server)


def test_a_process_that_says_nothing_is_alive_and_not_ready(server: ProcessInferenceServer) -> None:
    freeze(server)
    try:
        health = server.health(0.05)
        assert (health.alive, health.ready) == (True, False)
        assert "does not answer within 0.05 seconds" in health.reason
        with ThreadPoolExecutor(16) as pool:  # more than the socket holds
            asked = [pool.submit(server.stats) for _ in range(16)]

            async def ask() -> list[Health]:
                calls = [asyncio.ensure_future(server.ahealth(HANG)) for _ in range(2000)]
                await asyncio.sleep(0)  # all have asked
                os.kill(server.pid or 0, signal.SIGCONT)
                return await asyncio.gather(*calls)

            assert {health.ready for health in asyncio.run(ask())} == {True}
            assert {future.result(HANG).pending for future in asked} == {0}
    finally:
        os.kill(server.pid or 0, signal.SIGCONT)
    assert server.health(HANG).ready


def test_an_interrupt_of_the_terminal_is_the_parents_affair(server: ProcessInferenceServer) -> None:
    os.kill(server.pid or 0, signal.SIGINT)
    assert server.health(HANG).ready


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SCHEMES)
def test_a_trainer_in_the_parent_publishes_to_the_process(
    kind: type[MultiProcessWeightSyncScheme | SharedMemWeightSyncScheme], method: str
) -> None:
    scheme, source = kind(num_workers=1), policy(1.0)
    swap = kind is SharedMemWeightSyncScheme
    with ProcessInferenceServer(make_policy, slots(), ctx=method, weight_sync=scheme, swap_weights=swap) as server:
        client = server.client()
        scheme.init_on_sender(model=source)
        scheme.connect(version=10, timeout=HANG)
        for version in (10, 11, 12, 30):
            if version > 10:
                mark(source, float(version))
                scheme.send(version=version)
                mark(source, -1.0)
            reply = client(request(0), HANG)
            assert int(reply["policy_version"]) == version == server.policy_version
            assert mark_of(reply) == (1 if version == 10 else version)
        assert server.stats().trainer_connected
        with pytest.raises(WeightSyncError):
            scheme.send(policy(0.0, size=3))
    scheme.shutdown()
