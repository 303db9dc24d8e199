"""Environments that raise, hang, or take their process along: the others go on, and nothing is lost but a step."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aioinfer import CollectorError
from aioinfer.collectors import AsyncBatchedCollector, Restarts
from aioinfer.testing import eventually
from aioinfer.testing.inspection import let_call_time_out
from tests.collectors.worlds import (
    World,
    assert_plain_with_restarts,
    collect_until_made_again,
    make_policy,
    steps_by_env,
)
from tests.effort import Effort
from tests.limits import HANG

OFTEN = Restarts(lifetime=10_000, per_minute=10_000)


def make_collector(make: Any, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8}
    return AsyncBatchedCollector(make, **{**settings, "restarts": OFTEN, **options})


class Raising(World):
    """Raises in every so many steps, or in a reset."""

    def __init__(self, every: int = 29, resets: int = 0) -> None:
        super().__init__()
        self.left, self.resets_left = every, resets

    def step(self, action: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise ArithmeticError("this environment has had enough")
        return super().step(action)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.resets_left -= 1
        if not self.resets_left:
            raise ArithmeticError("no more resets")
        return super().reset(seed=seed)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_environment_that_raises_is_made_again(num_workers: int) -> None:
    with make_collector([Raising, *[World] * 5], num_workers=num_workers) as collector:
        batches = [batch.clone() for batch in itertools.islice(collector, 30)]
        stats = collector.stats()

    steps = steps_by_env(batches)
    assert assert_plain_with_restarts(steps, seed=3) >= 3
    assert set(stats.restarts) == {0}
    assert not stats.retired


def test_one_that_raises_in_its_reset_is_made_again_too() -> None:
    with make_collector([lambda: Raising(every=0, resets=4), *[World] * 3]) as collector:
        batches = [batch.clone() for batch in itertools.islice(collector, 20)]
        assert set(collector.stats().restarts) == {0}
    assert assert_plain_with_restarts(steps_by_env(batches), seed=3)


def test_without_restarts_left_it_is_retired_with_its_cause() -> None:
    with make_collector([Raising, *[World] * 3], restarts=Restarts(lifetime=2, per_minute=100)) as collector:
        for _ in itertools.islice(collector, 60):
            pass
        stats = collector.stats()
    assert stats.restarts == {0: 2}
    assert isinstance(stats.retired[0], ArithmeticError)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_few_environments_end_the_iteration_with_all_causes(num_workers: int) -> None:
    collector = make_collector([Raising] * 3, restarts=None, num_workers=num_workers)
    with collector, pytest.raises(CollectorError, match="this environment has had enough") as caught:
        for _ in collector:
            pass
    assert set(caught.value.causes) == {0, 1, 2}


def test_a_constructor_that_raises_ends_the_start_with_its_cause() -> None:
    def make() -> Any:
        raise OSError("no camera")

    with pytest.raises(CollectorError, match="no camera"):
        make_collector([make], restarts=None).start()


class Hanging(World):
    """Hangs in a step until it is let go."""

    def __init__(self, go_on: threading.Event, at: int = 20, phase: str = "step") -> None:
        super().__init__()
        self.go_on, self.left, self.phase = go_on, at, phase

    def step(self, action: Any) -> Any:
        self._pass("step")
        return super().step(action)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._pass("reset")
        return super().reset(seed=seed)

    def _pass(self, phase: str) -> None:
        self.left -= phase == self.phase
        if self.left == 0 and phase == self.phase:
            self.go_on.wait()


@pytest.mark.parametrize(("phase", "at"), [("step", 20), ("reset", 3), ("reset", 1), ("make", 0)])
def test_an_environment_that_hangs_is_made_again_and_costs_the_others_nothing(phase: str, at: int) -> None:
    go_on, made = threading.Event(), itertools.count()

    def make() -> Any:
        if next(made):
            return World()
        if phase == "make":
            go_on.wait()
        return Hanging(go_on, at, phase)

    try:
        timeout = {"step_timeout" if phase == "step" else "reset_timeout": 0.2}
        with make_collector([make, *[World] * 5], **timeout) as collector:
            batches = [batch.clone() for batch in itertools.islice(collector, 20)]
            stats = collector.stats()
    finally:
        go_on.set()
    assert_plain_with_restarts(steps_by_env(batches), seed=3)
    assert stats.timeouts >= 1
    assert stats.restarts[0] >= 1
    assert stats.abandoned_threads >= 1


class HangingOnce(World):
    """Hangs in a step, in a process of its own, the first time."""

    def __init__(self, path: Path, hung: Path, at: int = 20) -> None:
        super().__init__()
        self.left, self.hung = 0 if path.exists() else at, hung
        path.touch()

    def step(self, action: Any) -> Any:
        self.left -= 1
        if not self.left:
            self.hung.touch()
            signal.pause()
        return super().step(action)


def test_a_worker_with_an_environment_that_hangs_is_replaced(tmp_path: Path) -> None:
    makes = [lambda: HangingOnce(tmp_path / "made", tmp_path / "hung"), *[World] * 5]
    with make_collector(makes, num_workers=2, step_timeout=HANG) as collector, ThreadPoolExecutor(1) as pool:
        noticing = pool.submit(eventually, (tmp_path / "hung").exists)
        noticing.add_done_callback(lambda _: let_call_time_out(collector, 2 * HANG))
        batches = collect_until_made_again(collector, seed=3)
        stats = collector.stats()
    assert assert_plain_with_restarts(steps_by_env(batches), seed=3) >= 1
    assert stats.timeouts == 1


class Killed(World):
    """Kills its process in a step, the first time."""

    def __init__(self, path: Path, at: int = 20) -> None:
        super().__init__()
        self.left = 0 if path.exists() else at
        path.touch()

    def step(self, action: Any) -> Any:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def test_a_worker_that_is_killed_is_started_again_and_its_steps_survive(tmp_path: Path) -> None:
    makes = [lambda: Killed(tmp_path / "made"), *[World] * 5]
    with make_collector(makes, num_workers=2) as collector:
        batches = collect_until_made_again(collector, seed=3)
        stats = collector.stats()
    steps = steps_by_env(batches)
    assert assert_plain_with_restarts(steps, seed=3) >= 1
    assert set(stats.restarts) == {0, 1, 2}


def test_closing_is_bounded_beside_an_environment_that_hangs() -> None:
    go_on = threading.Event()
    collector = make_collector([lambda: Hanging(go_on, 1), *[World] * 3]).start()
    try:
        collector.shutdown(0.1)
    finally:
        go_on.set()


def kill_one(rng: random.Random) -> bool:
    """Kill a worker; returns whether there was one."""
    with suppress(IndexError, ValueError):  # there is none, or it has just ended
        rng.choice(multiprocessing.active_children()).kill()
        return True
    return False


@pytest.mark.parametrize("order", ["fair", "first"])
def test_kills_at_random_moments_lose_steps_under_way_only(order: str, effort: Effort) -> None:
    rng, kills = effort.random(), effort.times(3, stress=100)
    with make_collector([World] * 12, num_workers=3, groups_per_worker=2, order=order) as collector:
        batches, killed = [], 0
        for batch in collector:
            batches.append(batch.clone())
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.02)
                killed += kill_one(rng)
            if killed >= kills and sum(collector.stats().restarts.values()) >= kills:  # the last one was noticed
                break
    assert_plain_with_restarts(steps_by_env(batches), seed=3)
