"""What is the same again: batches in lockstep, the episodes of a seed, and those of a collector that goes on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.collectors.seeds import env_seed, make_entropy
from tests.collectors.worlds import (
    AsyncWorld,
    World,
    assert_plain,
    make_policy,
    plain_steps,
    steps_by_env,
)


class Sampling(nn.Module):
    """Draws an action from probabilities that a matrix makes of the observation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-0.003, 0.003, 12).reshape(4, 3))
            self.linear.bias.zero_()

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.tanh(self.linear(observation))
        return torch.multinomial(scores.softmax(-1), 1)[:, 0], scores


def sampling() -> TensorDictModule:
    return TensorDictModule(Sampling(), in_keys=["observation"], out_keys=["action", "scores"])


def collect(makes: Any, batches: int = 6, **options: Any) -> list[TensorDictBase]:
    options = {"policy": sampling(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8, **options}
    with AsyncBatchedCollector(makes, **options) as collector:
        return [batch.clone() for batch in itertools.islice(collector, batches)]


def is_same(first: list[TensorDictBase], second: list[TensorDictBase]) -> bool:
    return len(first) == len(second) and all(
        bool((one == other).all()) for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_envs", [5, 12])
def test_batches_in_lockstep_are_the_same_from_run_to_run(num_workers: int, num_envs: int) -> None:
    def run(seed: int = 3) -> list[TensorDictBase]:
        return collect(World, num_envs=num_envs, num_workers=num_workers, in_lockstep=True, seed=seed)

    first = run()
    assert is_same(first, run())
    assert not is_same(first, run(seed=4))


def test_batches_in_lockstep_are_the_same_with_asynchronous_environments_beside_others() -> None:
    def run() -> list[TensorDictBase]:
        return collect([AsyncWorld, World, AsyncWorld, World, World], in_lockstep=True, init_random_frames=100)

    assert is_same(run(), run())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_program_in_lockstep_that_updates_weights_does_the_same_again(num_workers: int) -> None:
    def run() -> tuple[list[TensorDictBase], Tensor]:
        torch.manual_seed(0)
        policy = sampling()
        found = []
        with AsyncBatchedCollector(
            World,
            policy=policy,
            num_envs=8,
            num_workers=num_workers,
            frames_per_batch=64,
            fragment_length=8,
            seed=3,
            in_lockstep=True,
        ) as collector:
            for batch in itertools.islice(collector, 5):
                found.append(batch.clone())
                with torch.no_grad():
                    for parameter in policy.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.01 * float(batch["observation"].std()))
                collector.update_policy_weights_()
        return found, torch.rand(3)

    (first, drawn), (second, drawn_again) = run(), run()
    assert is_same(first, second)
    assert torch.equal(drawn, drawn_again), "the program's own random numbers are its own"
    assert [batch["policy_version"].unique().tolist() for batch in first] == [[0], [1], [2], [3], [4]]


def first_steps(**options: Any) -> list[list[Any]]:
    """What each environment observes in its first steps."""
    batches = collect(World, num_envs=6, policy=make_policy(), **options)
    return [[step["observation"].tolist() for step in steps[:50]] for _, steps in sorted(steps_by_env(batches).items())]


def test_episodes_are_the_same_whatever_steps_them() -> None:
    alone = first_steps(batches=8, groups_per_worker=1)
    assert len({str(observations[0]) for observations in alone}) == 6, "no two environments live through the same"
    assert alone == first_steps(batches=8, num_workers=2, groups_per_worker=2)
    assert alone == first_steps(batches=8, num_workers=1, groups_per_worker=3)


def test_without_a_seed_episodes_are_others_each_time() -> None:
    assert first_steps(seed=None, batches=1) != first_steps(seed=None, batches=1)


def test_the_seed_can_be_set_before_the_start() -> None:
    collector = AsyncBatchedCollector(World, policy=make_policy(), num_envs=4, frames_per_batch=64, fragment_length=8)
    assert isinstance(collector.set_seed(3), int)
    with collector:
        assert_plain(steps_by_env([batch.clone() for batch in itertools.islice(collector, 3)]), seed=3)
        with pytest.raises(RuntimeError, match="has started"):
            collector.set_seed(4)


def test_another_collector_goes_on_with_other_episodes_and_the_same_budget() -> None:
    def make(seed: int | None) -> AsyncBatchedCollector:
        return AsyncBatchedCollector(
            World,
            policy=make_policy(),
            num_envs=3,
            frames_per_batch=24,
            fragment_length=8,
            total_frames=100,
            init_random_frames=30,
            seed=seed,
        )

    with make(3) as first:
        before = [batch.clone() for batch in itertools.islice(first, 2)]
        state = first.state_dict()
    second = make(None)
    second.load_state_dict(state)
    with second:
        after = [batch.clone() for batch in second]
    assert state["frames"] == 48
    assert second.state_dict()["frames"] == 100
    assert sum(int(batch["collector", "mask"].sum()) for batch in after) == 52
    assert sum(int(batch["collector", "random"].sum()) for batch in before) == 30
    assert not any(batch["collector", "random"].any() for batch in after)
    policy = make_policy()
    for env, steps in steps_by_env(after).items():
        expected = next(plain_steps(World, env_seed(make_entropy(3), env, 1), policy))
        assert steps[0]["observation"].tolist() == expected["observation"].tolist()
    with pytest.raises(ValueError, match="3 environments"):
        AsyncBatchedCollector(World, policy=make_policy(), num_envs=4).load_state_dict(state)
