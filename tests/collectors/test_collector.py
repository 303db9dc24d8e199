"""What a collector yields: the steps of a plain loop, of each environment, in batches of fragments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from aioinfer.collectors import AsyncBatchedCollector, with_next_observation
from tests.collectors.worlds import World, as_steps, assert_plain, make_policy, steps_by_env


def collect(count: int | None = None, **options: Any) -> list[Any]:
    options = {"policy": make_policy(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8, **options}
    with AsyncBatchedCollector(options.pop("make", World), **options) as collector:
        return [batch.clone() for batch in itertools.islice(collector, count)]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("order", ["fair", "first"])
def test_each_environment_lives_through_a_plain_loop(num_workers: int, groups: int, order: str) -> None:
    batches = collect(12, num_envs=7, num_workers=num_workers, groups_per_worker=groups, order=order)

    assert all(batch.shape == (8, 8) for batch in batches)
    steps = steps_by_env(batches)
    assert_plain(steps, seed=3)
    assert sum(map(len, steps.values())) == 12 * 64


def test_frames_are_exact() -> None:
    batches = collect(num_envs=5, total_frames=150)

    assert [int(batch["collector", "mask"].sum()) for batch in batches] == [64, 64, 22]
    assert batches[-1].shape == (3, 8)
    assert not batches[-1]["observation"][-1, 6:].any()
    assert_plain(steps_by_env(batches), seed=3)


async def test_batches_can_be_awaited() -> None:
    async with AsyncBatchedCollector(
        World, policy=make_policy(), num_envs=4, seed=3, frames_per_batch=64, fragment_length=8, total_frames=256
    ) as collector:
        batches = [batch.clone() async for batch in collector if batch is not None]
    assert len(batches) == 4
    assert_plain(steps_by_env(batches), seed=3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_next_observations_the_usual_batch_can_be_made(num_workers: int) -> None:
    batches = collect(10, num_envs=4, next_observation=False, num_workers=num_workers, fragment_length=16)

    assert all("observation" not in batch["next"] for batch in batches)
    assert all(batch["observation"].shape == (4, 17, 3) for batch in batches)
    steps = steps_by_env([with_next_observation(batch) for batch in batches])
    assert_plain(steps, seed=3)
    assert sum(map(len, steps.values())) > 300


def test_whole_episodes_are_those_of_a_plain_loop() -> None:
    batches = collect(num_envs=4, yield_completed_trajectories=True, total_frames=500)

    assert all(batch.ndim == 1 and len(batch) >= 64 for batch in batches[:-1])
    assert sum(map(len, batches)) >= 500
    found: dict[int, list[Any]] = {}
    for batch in batches:
        assert bool(batch["next", "done"][-1])
        for env, one in zip(batch["collector", "env"].tolist(), as_steps(batch), strict=True):
            found.setdefault(env, []).append(one)
    assert_plain(found, seed=3)
