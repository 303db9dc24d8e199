"""What a user may do that is not in the first example: each does what it should, or says what is wrong."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from aioinfer import InferenceServer, ServerNotRunningError, ThreadingTransport
from aioinfer.collectors import AsyncBatchedCollector
from tests.collectors.worlds import World, make_policy
from tests.limits import HANG


def make_collector(make: Any = World, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 32, "fragment_length": 8}
    return AsyncBatchedCollector(make, **{**settings, **options})


@contextmanager
def in_thread(function: Any) -> Iterator[list[BaseException]]:
    """Run a function in a thread until the end of the block; what it raises is in the list."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield raised
    thread.join(HANG)
    assert not thread.is_alive()


@pytest.mark.parametrize("in_lockstep", [False, True])
def test_fragments_that_are_too_old_make_room_for_others(in_lockstep: bool) -> None:
    with make_collector(num_envs=3, max_policy_lag=0, in_lockstep=in_lockstep) as collector:
        for batch in itertools.islice(collector, 4):
            assert set(batch["policy_version"].unique().tolist()) == {collector.policy_version}
            with collector.pause():  # whatever is unread is of older weights
                collector.update_weights()


def test_whole_episodes_can_be_collected_in_lockstep() -> None:
    runs = []
    for _ in range(2):
        with make_collector(num_envs=3, in_lockstep=True, yield_completed_trajectories=True) as collector:
            runs.append([batch["next", "reward"].tolist() for batch in itertools.islice(collector, 4)])
    assert runs[0] == runs[1]


def test_a_server_that_does_not_run_is_refused() -> None:
    server = InferenceServer(make_policy(), ThreadingTransport())
    with pytest.raises(ServerNotRunningError, match="start it before"):
        make_collector(policy=None, server=server).start()


def test_it_can_be_shut_down_while_an_environment_is_being_made() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def make() -> Any:
        reached.set()
        go_on.wait(HANG)
        return World()

    collector = make_collector(make)
    try:
        with in_thread(collector.start) as raised:
            assert reached.wait(HANG)
            collector.shutdown(0.1)
        assert [str(error) for error in raised] == ["the collector was shut down; make another one"]
    finally:
        go_on.set()


def test_a_reader_whose_loop_is_gone_costs_the_next_one_nothing() -> None:
    go_on = threading.Event()

    class Waiting(World):
        def step(self, action: Any) -> Any:
            go_on.wait(HANG)
            return super().step(action)

    async def give_up() -> None:
        reading = asyncio.ensure_future(anext(aiter(collector)))
        await asyncio.sleep(0)
        reading.cancel()

    with make_collector(Waiting) as collector:
        asyncio.run(give_up())
        go_on.set()
        assert next(iter(collector)).shape == (4, 8)
