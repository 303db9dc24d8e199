"""When batches leave, in a server that runs."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import (
    BatchingRule,
    DispatchReason,
    InferenceServer,
    MPTransport,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.batching import Hold, Situation
from aioinfer.testing import double
from tests.limits import HANG
from tests.switching import switch_interval


def request() -> TensorDictBase:
    return TensorDict({"observation": torch.ones(2)}, batch_size=[])


class ForFour(BatchingRule):
    """Wait for a batch of four rows for as long as the server lets it."""

    def hold(self, situation: Situation) -> Hold | None:
        missing = 4 - situation.pending
        return Hold(missing, 2 * HANG) if missing > 0 else None


async def test_a_rule_of_the_users_holds_batches_back() -> None:
    async with InferenceServer(double, ThreadingTransport(), batching=ForFour(), batch_timeout=HANG) as server:
        client = server.async_client()
        await asyncio.gather(*[client.submit(request()) for _ in range(4)])
        first = client.submit(request())
        await asyncio.sleep(0)
        assert not first.done()
        await asyncio.gather(first, *[client.submit(request()) for _ in range(3)])
        assert server.stats().mean_batch_size == 4


async def test_a_hold_ends_with_the_batch_timeout_and_is_seen_in_the_statistics() -> None:
    async with InferenceServer(double, ThreadingTransport(), batching=ForFour(), batch_timeout=0.001) as server:
        await server.async_client()(request())
        stats = server.stats()
        assert dict(stats.batches) == {DispatchReason.TIMEOUT: 1}
        assert stats.held.p50 >= 0.001


async def test_a_held_batch_is_served_first_when_the_server_drains() -> None:
    server = InferenceServer(double, ThreadingTransport(), batching=ForFour(), batch_timeout=HANG)
    async with server:
        held = server.async_client().submit(request())
        await asyncio.sleep(0)
        await server.aclose(HANG, drain=True)
        assert held.done()
        assert dict(server.stats().batches) == {DispatchReason.DRAIN: 1}


def test_a_pause_that_is_asked_for_as_requests_come_does_not_wait_for_the_hold() -> None:
    transport = ThreadingTransport()
    with (
        InferenceServer(double, transport, batching=ForFour(), batch_timeout=2 * HANG) as server,
        switch_interval(HANG),  # one wake-up of the model thread for both
    ):
        held = transport.submit(request())
        with server.paused():
            assert not held.done()


@pytest.mark.parametrize("transport", [ThreadingTransport, MPTransport])
@pytest.mark.parametrize("seconds", [1e9, math.inf])
async def test_a_batch_timeout_may_be_of_any_length(
    transport: type[ThreadingTransport | MPTransport], seconds: float
) -> None:
    async with InferenceServer(double, transport(), min_batch_size=2, batch_timeout=seconds) as server:
        client, other = server.async_clients(2)
        first = client.submit(request())
        await asyncio.sleep(0)
        await asyncio.gather(first, other.submit(request()))


@pytest.mark.parametrize("transport", [ThreadingTransport, lambda: SlotTransport(1)])
async def test_what_is_learned_is_seen_in_the_statistics(transport: type[ThreadingTransport]) -> None:
    async with InferenceServer(double, transport()) as server:
        client = server.async_client()
        for _ in range(10):
            await client(request())
        stats = server.stats()
        assert dict(stats.batches) == {DispatchReason.IDLE: 10}
        assert stats.held.p99 == 0
        assert list(stats.pass_seconds) == [1]
        assert stats.pass_seconds[1] > 0
        assert stats.callers == 1
        assert stats.think_time.p50 > 0


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="BatchingRule"):
        InferenceServer(double, ThreadingTransport(), batching="learned")  # type: ignore[arg-type]
