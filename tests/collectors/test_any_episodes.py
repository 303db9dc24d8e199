"""Whatever the episodes: sequences, and the advantages computed of them, are those of a plain loop."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer.collectors import AsyncBatchedCollector, Restarts
from aioinfer.collectors.seeds import env_seed, make_entropy
from tests.collectors.scripted_env import EPISODES, Episode, ScriptedEnv
from tests.collectors.worlds import (
    Step,
    assert_equal,
    plain_steps,
    steps_by_env,
)

Script = Sequence[Episode]


class Act(nn.Module):
    """Chooses one of the actions 3 to 7, and returns a value of the observation."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        score = (observation * torch.tensor([1.0, 3.0, 5.0, 7.0])).sum(-1)
        return score.long() % 5 + 3, score


def make_policy() -> TensorDictModule:
    return TensorDictModule(Act(), in_keys=["observation"], out_keys=["action", "score"])


class Row(ScriptedEnv):
    """One of several that a vector environment steps, whose actions are numbers of NumPy."""

    def step(self, action: Any) -> Any:
        return super().step(int(action))


def plain(script: Script, env: int) -> Iterator[Step]:
    return plain_steps(lambda: ScriptedEnv(script), env_seed(make_entropy(3), env, 0), make_policy())


def collect(makes: Any, frames: int, **options: Any) -> list[TensorDictBase]:
    with AsyncBatchedCollector(makes, policy=make_policy(), seed=3, total_frames=frames, **options) as collector:
        return [batch.clone() for batch in collector]


def assert_plain(batches: list[TensorDictBase], scripts: Sequence[Script], frames: int) -> None:
    steps = steps_by_env(batches)
    assert sum(map(len, steps.values())) == frames
    for env, found in steps.items():
        for one, expected in zip(found, plain(scripts[env], env), strict=False):
            assert_equal(one, expected)


# Each example starts threads and a server.
few = settings(max_examples=15)


@few
@given(
    scripts=st.lists(EPISODES, min_size=1, max_size=5),
    vector=st.lists(EPISODES, max_size=3),
    mode=st.sampled_from(AutoresetMode),
    groups=st.integers(1, 3),
    order=st.sampled_from(["fair", "first"]),
    length=st.integers(1, 5),
    rows=st.integers(1, 4),
    frames=st.integers(1, 120),
)
def test_sequences_are_those_of_a_plain_loop(
    scripts: list[Script],
    vector: list[Script],
    mode: AutoresetMode,
    groups: int,
    order: str,
    length: int,
    rows: int,
    frames: int,
) -> None:
    makes: list[Callable[[], Any]] = [partial(ScriptedEnv, script, reuse=True) for script in scripts]
    if vector:
        makes.append(lambda: SyncVectorEnv([partial(Row, script) for script in vector], autoreset_mode=mode))
    batches = collect(
        makes,
        frames,
        groups_per_worker=groups,
        order=order,
        fragment_length=length,
        frames_per_batch=length * rows,
    )
    assert all(int(batch["collector", "mask"].sum()) == length * rows for batch in batches[:-1])
    assert_plain(batches, [*scripts, *vector], frames)


@settings(few, max_examples=2)
@given(scripts=st.lists(EPISODES, min_size=3, max_size=5), groups=st.integers(1, 2))
def test_sequences_in_workers_are_those_of_a_plain_loop(scripts: list[Script], groups: int) -> None:
    makes: list[Callable[[], Any]] = [partial(ScriptedEnv, script) for script in scripts]
    batches = collect(makes, 200, num_workers=2, groups_per_worker=groups, fragment_length=4, frames_per_batch=20)
    assert_plain(batches, scripts, 200)


def advantages(steps: Sequence[Step], value: Callable[[Any], float], gamma: float, decay: float) -> list[float]:
    """Generalised advantages of the consecutive steps of one environment, by their definition."""
    found: list[float] = []
    following = 0.0
    for step in reversed(steps):
        bootstrap = 0.0 if step["terminated"] else value(step["next"])
        error = float(step["reward"]) + gamma * bootstrap - value(step["observation"])
        ended = step["terminated"] or step["truncated"]
        following = error + (0.0 if ended else gamma * decay * following)
        found.append(following)
    return found[::-1]


def batch_advantages(batch: TensorDictBase, value: Callable[[Tensor], Tensor], gamma: float, decay: float) -> Tensor:
    """The same for a batch, row by row, as every library computes them."""
    following = batch["next"]
    bootstrap = value(following["observation"]) * ~following["terminated"][..., 0]
    errors = following["reward"][..., 0].double() + gamma * bootstrap - value(batch["observation"])
    found = torch.zeros_like(errors)
    last = torch.zeros(len(batch), dtype=torch.float64)
    for step in reversed(range(batch.shape[1])):
        last = errors[:, step] + gamma * decay * last * ~following["done"][:, step, 0]
        found[:, step] = last
    return found


@few
@given(scripts=st.lists(EPISODES, min_size=1, max_size=4), length=st.integers(1, 6))
def test_advantages_of_a_batch_are_those_of_the_plain_loop(scripts: list[Script], length: int) -> None:
    def value(observation: Any) -> Any:
        return (torch.as_tensor(observation).double() / 100).sin().sum(-1)

    makes: list[Callable[[], Any]] = [partial(ScriptedEnv, script) for script in scripts]
    batches = collect(makes, 12 * length, fragment_length=length, frames_per_batch=3 * length)
    loops = [plain(script, env) for env, script in enumerate(scripts)]
    for batch in batches:
        found = batch_advantages(batch, value, 0.97, 0.9)
        for fragment, of_fragment in zip(batch.unbind(0), found, strict=True):
            steps = list(itertools.islice(loops[int(fragment["collector", "env"][0])], length))
            expected = advantages(steps, lambda observation: float(value(observation)), 0.97, 0.9)
            torch.testing.assert_close(of_fragment, torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_no_episode_has_the_number_of_another_one_not_even_of_one_that_was_made_again() -> None:
    script = [Episode(3, terminated=True, truncated=False)]
    makes = itertools.count()

    def make() -> Any:
        return ScriptedEnv(script, at={} if next(makes) else {("step", 10): _fail})

    with AsyncBatchedCollector(
        [make, lambda: ScriptedEnv(script)],
        policy=make_policy(),
        seed=3,
        fragment_length=4,
        frames_per_batch=16,
        restarts=Restarts(lifetime=10, per_minute=10),
    ) as collector:
        batches = [batch.clone() for batch in itertools.islice(collector, 20)]
    episodes: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for batch in batches:
        for step in batch[batch["collector", "mask"]].unbind(0):
            collected = step["collector"]
            episodes[int(collected["episode"])].append((int(collected["env"]), int(collected["step"])))
    for steps in episodes.values():
        env = steps[0][0]
        assert steps == [(env, number) for number in range(len(steps))]
        assert len(steps) <= 3
    assert len(episodes) > 80


def _fail() -> None:
    raise RuntimeError("the motor is hot")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_environment_that_writes_into_old_observations_spoils_nothing(num_workers: int) -> None:
    script = [Episode(3, True, False), Episode(2, False, True)]
    batches = collect(
        lambda: ScriptedEnv(script, reuse=True),
        120,
        num_envs=3,
        num_workers=num_workers,
        fragment_length=4,
        frames_per_batch=24,
    )
    assert_plain(batches, [script] * 3, 120)
