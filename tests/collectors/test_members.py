"""Members of every kind beside each other: each environment of theirs lives through what a plain loop lives through."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict.nn.probabilistic import interaction_type

from aioinfer.collectors import AsyncBatchedCollector, Restarts
from aioinfer.testing.inspection import let_call_time_out, look_for_late_calls
from tests.collectors.worlds import (
    AsyncWorld,
    World,
    assert_plain,
    assert_plain_with_restarts,
    collect_until_made_again,
    make_policy,
    steps_by_env,
)
from tests.limits import HANG

OFTEN = Restarts(lifetime=1000, per_minute=1000)


class Row(World):
    """One of several that a vector environment steps, which hands out numbers of NumPy."""

    def step(self, action: Any) -> Any:
        return super().step(int(action))


def vector(mode: AutoresetMode, rows: int = 3, ends: float = 0.1) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Row(ends)] * rows, autoreset_mode=mode)


def make_collector(makes: Any, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8}
    return AsyncBatchedCollector(makes, **{**settings, **options})


def collect(makes: Any, count: int | None = 12, **options: Any) -> list[Any]:
    with make_collector(makes, **options) as collector:
        return [batch.clone() for batch in itertools.islice(collector, count)]


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("ends", [0.1, 0.6])
def test_rows_of_a_vector_environment_live_as_single_ones_do(mode: AutoresetMode, ends: float) -> None:
    makes = [lambda: World(ends), lambda: vector(mode, ends=ends), lambda: World(ends), lambda: vector(mode, 2, ends)]
    batches = collect(makes, None, total_frames=600)

    steps = steps_by_env(batches)
    assert_plain(steps, seed=3, make=lambda: World(ends))
    assert set(steps) == set(range(7))
    assert sum(map(len, steps.values())) == 600


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_environment_in_a_worker_lives_as_single_ones_do(mode: AutoresetMode) -> None:
    batches = collect([World, lambda: vector(mode), World], num_workers=1)
    assert_plain(steps_by_env(batches), seed=3)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_rows_that_step_at_one_pace_are_in_batches_equally_often(mode: AutoresetMode) -> None:
    batches = collect([lambda: vector(mode, 4)], 9, frames_per_batch=32)
    assert {env: len(steps) for env, steps in steps_by_env(batches).items()} == dict.fromkeys(range(4), 72)


def test_a_vector_environment_that_raises_is_made_again_as_a_whole() -> None:
    class Raising(Row):
        left = 40

        def step(self, action: Any) -> Any:
            Raising.left -= 1
            if not Raising.left:
                raise ArithmeticError("one of its rows has had enough")
            return super().step(action)

    def make() -> Any:
        return SyncVectorEnv([Raising, Row, Row], autoreset_mode=AutoresetMode.SAME_STEP)

    with make_collector([World, make], restarts=OFTEN) as collector:
        batches = collect_until_made_again(collector, seed=3, env=3)
        stats = collector.stats()
    assert stats.restarts == {1: 1, 2: 1, 3: 1}
    assert assert_plain_with_restarts(steps_by_env(batches), seed=3) == 3


async def test_asynchronous_environments_live_as_single_ones_do() -> None:
    async with make_collector([AsyncWorld, World, AsyncWorld]) as collector:
        batches = []
        async for batch in collector:
            batches.append(batch.clone())
            if len(batches) == 9:
                break
    steps = steps_by_env(batches)
    assert_plain(steps, seed=3)
    assert set(steps) == {0, 1, 2}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_asynchronous_environments_do_without_an_event_loop_of_the_reader(num_workers: int) -> None:
    batches = collect([AsyncWorld, World, lambda: vector(AutoresetMode.NEXT_STEP), AsyncWorld], num_workers=num_workers)
    steps = steps_by_env(batches)
    assert_plain(steps, seed=3)
    assert set(steps) == set(range(6))


async def test_they_leave_the_exploration_mode_of_their_event_loop_alone() -> None:
    before, seen = interaction_type(), set()

    class Looking(AsyncWorld):
        async def step(self, action: Any) -> Any:
            seen.add(interaction_type())
            return await super().step(action)

    async with AsyncBatchedCollector(
        [Looking] * 3, policy=make_policy(), frames_per_batch=32, fragment_length=8, total_frames=96
    ) as collector:
        async for _ in collector:
            pass
    assert seen == {before}
    assert interaction_type() is before


async def test_asynchronous_environments_that_exist_run_on_the_event_loop_of_the_reader() -> None:
    loops = set()

    class Telling(AsyncWorld):
        async def step(self, action: Any) -> Any:
            loops.add(asyncio.get_running_loop())
            return await super().step(action)

    envs = [Telling() for _ in range(3)]
    async with make_collector(envs, total_frames=100) as collector:
        batches = [batch.clone() async for batch in collector]
    assert_plain(steps_by_env(batches), seed=3)
    assert loops == {asyncio.get_running_loop()}
    assert all(env.closed for env in envs)


class HangingOnce(AsyncWorld):
    """Hangs in a step, or a reset, of the first one that is made."""

    made = 0

    def __init__(self, phase: str, stubborn: bool, hung: Callable[[], None]) -> None:
        super().__init__()
        self.hung = hung
        type(self).made += 1
        self.hangs = type(self).made == 1
        self.phase, self.stubborn = phase, stubborn
        self.left = 20 if phase == "step" else 2

    async def step(self, action: Any) -> Any:
        await self._maybe_hang("step")
        return await super().step(action)

    async def reset(self, *, seed: int | None = None) -> Any:
        await self._maybe_hang("reset")
        return await super().reset(seed=seed)

    async def _maybe_hang(self, phase: str) -> None:
        self.left -= phase == self.phase
        if not self.hangs or self.left or phase != self.phase:
            return
        while True:
            self.hung()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
                self.stubborn = False


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("phase", ["step", "reset"])
def test_an_asynchronous_environment_that_hangs_is_cancelled_and_made_again(phase: str, stubborn: bool) -> None:
    HangingOnce.made = 0
    makes = [lambda: HangingOnce(phase, stubborn, lambda: let_call_time_out(collector, 2 * HANG)), World, AsyncWorld]
    collector = make_collector(makes, restarts=OFTEN, step_timeout=HANG, reset_timeout=HANG)
    with collector:
        batches = collect_until_made_again(collector, seed=3)
        stats = collector.stats()
    assert assert_plain_with_restarts(steps_by_env(batches), seed=3) == 1
    assert stats.restarts == {0: 1}
    assert stats.timeouts == 1
    assert stats.abandoned_threads == 0


def test_the_cause_of_an_asynchronous_environment_that_is_retired_is_told() -> None:
    HangingOnce.made = 0
    makes = [lambda: HangingOnce("step", False, lambda: let_call_time_out(collector, 2 * HANG)), World]
    collector = make_collector(makes, restarts=None, step_timeout=HANG)
    with collector:
        for _ in collector:
            if retired := collector.stats().retired:
                break
    assert isinstance(retired[0], TimeoutError)


def test_one_that_swallows_its_cancellation_and_then_steps_on_is_cancelled_again_when_it_hangs_again() -> None:
    class Twice(AsyncWorld):
        """Hangs in two steps; at the first cancellation it returns, as if nothing had happened."""

        made = 0

        def __init__(self) -> None:
            super().__init__()
            Twice.made += 1
            self.steps = 0

        async def step(self, action: Any) -> Any:
            self.steps += 1
            if Twice.made == 1 and self.steps in (5, 10):
                let_call_time_out(collector, 2 * HANG)
                for _ in range(3):  # what it finds late again before the cancellation was felt is not left behind
                    look_for_late_calls(collector, time.monotonic())
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if self.steps == 10:
                        cancelled.append(self.steps)
                        raise
            return await super().step(action)

    cancelled: list[int] = []
    collector = make_collector([Twice, World], restarts=OFTEN, step_timeout=HANG)
    with collector:
        batches = collect_until_made_again(collector, seed=3)
    assert cancelled == [10]
    assert_plain_with_restarts(steps_by_env(batches), seed=3)


def test_a_member_of_other_spaces_is_refused() -> None:
    class Wide(World):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float32)

    with make_collector([World, Wide], restarts=None) as collector:
        next(iter(collector))
        retired = collector.stats().retired
    assert isinstance(retired[1], ValueError)
    assert "are not those of the others" in str(retired[1])
