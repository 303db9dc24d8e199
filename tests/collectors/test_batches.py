"""What a batch contains: entries, spaces, recurrent states, random steps, whole episodes, and who gets it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn

from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.collectors.seeds import env_seed, make_entropy
from tests.collectors.worlds import (
    AsyncWorld,
    World,
    as_steps,
    assert_equal,
    assert_plain,
    make_policy,
    plain_steps,
    steps_by_env,
)


def make_collector(makes: Any = World, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8}
    return AsyncBatchedCollector(makes, **{**settings, **options})


def collect(makes: Any = World, count: int | None = 6, **options: Any) -> list[Any]:
    with make_collector(makes, **options) as collector:
        return [batch.clone() for batch in itertools.islice(collector, count)]


def function(answer: Callable[[TensorDictBase], dict[str, Any]]) -> Callable[[TensorDictBase], TensorDictBase]:
    """A policy that is a function."""
    return lambda td: TensorDict(answer(td), batch_size=td.batch_size)


# -- entries -----------------------------------------------------------------------------------------------


def test_a_batch_has_these_entries() -> None:
    (batch,) = collect(count=1, num_envs=8)
    shapes: Any = {
        key: (tuple(value.shape), value.dtype) for key, value in batch.items(include_nested=True, leaves_only=True)
    }
    flag, number = ((8, 8, 1), torch.bool), ((8, 8), torch.int64)
    observation = ((8, 8, 3), torch.float32)
    expected: dict[Any, Any] = {
        "observation": observation,
        "action": number,
        "score": ((8, 8), torch.float32),
        "policy_version": number,
        **dict.fromkeys(("is_init", "done", "terminated", "truncated"), flag),
        ("next", "observation"): observation,
        ("next", "reward"): ((8, 8, 1), torch.float32),
        **{("next", key): flag for key in ("done", "terminated", "truncated")},
        **{("collector", key): number for key in ("env", "episode", "step")},
        **{("collector", key): ((8, 8), torch.bool) for key in ("random", "mask")},
    }
    assert shapes == expected
    assert batch["next"].batch_size == batch["collector"].batch_size == batch.batch_size == (8, 8)


def test_batches_are_views_of_memory_that_is_used_again_and_may_be_written_to() -> None:
    with make_collector(num_envs=8) as collector:
        places = set()
        for batch in itertools.islice(collector, 40):
            places.add(batch["observation"].data_ptr())
            batch["advantage"] = torch.zeros(8, 8)
            batch["observation"].mul_(0)
            batch["next", "reward"].add_(1)
        assert len(places) < 10
    (batch,) = collect(count=1)
    assert batch["observation"].any(), "a clone is kept"


def test_bootstrap_values_may_be_computed_with_gradients() -> None:
    (batch,) = collect(count=1)
    value = nn.Linear(3, 1)
    value(batch["next", "observation"]).sum().backward()
    assert value.weight.grad is not None


# -- spaces ------------------------------------------------------------------------------------------------


class Rich(gymnasium.Env[Any, Any]):
    """Observations and actions of all spaces; each observation repeats the action before."""

    actions = spaces.Dict(
        {
            "choice": spaces.Discrete(3, start=5),
            "pair": spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,), np.float64)]),
            "bits": spaces.MultiBinary(4),
        }
    )

    def __init__(self, text: bool = True) -> None:
        self.action_space = self.actions
        entries: dict[str, Any] = {"last": self.actions, "count": spaces.Discrete(10_000)}
        self.observation_space = spaces.Dict(entries | ({"say": spaces.Text(20)} if text else {}))
        self.text = text
        self.steps = 0

    def observe(self, action: Any) -> Any:
        says = {"say": f"step {self.steps}"} if self.text else {}
        return {"last": action, "count": self.steps, **says}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        nothing = {"choice": 5, "pair": (np.zeros(2, np.int64), np.zeros(2)), "bits": np.zeros(4, np.int8)}
        return self.observe(nothing), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observe(action), 1.0, self.steps % 5 == 0, False, {}


def rich_action(td: TensorDictBase) -> dict[str, Any]:
    count = td["observation", "count"]
    return {
        "action": {
            "choice": 5 + count % 3,
            "pair": {
                "0": torch.stack([count % 2, count % 3], -1),
                "1": torch.stack([count / 1e5, -count / 1e5], -1).double(),
            },
            "bits": (count[:, None] // torch.tensor([1, 2, 4, 8]) % 2).to(torch.int8),
        }
    }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_observations_and_actions_of_all_spaces_arrive_as_they_are(num_workers: int) -> None:
    batches = collect(
        lambda: Rich(text=num_workers == 0),
        policy=function(rich_action),
        num_envs=2,
        num_workers=num_workers,
        init_random_frames=20,
    )
    for batch in batches:
        taken, returned = batch["action"], batch["next", "observation"]
        assert set(batch["action", "choice"].flatten().tolist()) <= {5, 6, 7}
        for key, value in taken.items(include_nested=True, leaves_only=True):
            assert torch.equal(value, returned["last"][key]), key
        asked = ~batch["collector", "random"]
        assert (batch["action"] == rich_action_of(batch))[asked].all()
        if num_workers == 0:
            counts = returned["count"].flatten().tolist()
            said = [text for row in returned.get("say").tolist() for text in row]
            assert said == [f"step {count}" for count in counts]


def rich_action_of(batch: TensorDictBase) -> Any:
    flat = batch.exclude(("observation", "say")).reshape(-1)
    return TensorDict(rich_action(flat)["action"], batch_size=flat.batch_size).reshape(batch.batch_size)


def test_text_is_refused_with_workers_by_name() -> None:
    collector = make_collector(Rich, policy=function(rich_action), num_workers=1)
    with pytest.raises(ValueError, match="'say'"):
        collector.start()


def test_entries_of_infos_are_kept_where_asked() -> None:
    class Informing(World):
        lives = 0

        def step(self, action: Any) -> Any:
            self.lives += 1
            info = {"lives": self.lives, "other": "x", "pair": [self.lives, 1]}
            return *super().step(action)[:4], info if self.lives % 2 else {"pair": [self.lives, 1]}

    batches = collect(Informing, info_keys={"lives": np.float64, "pair": ((2,), np.int64)})
    infos: Any = torch.cat([batch["next", "info"].reshape(-1) for batch in batches])
    assert infos["pair"].tolist() == [[number, 1] for number in range(1, len(infos) + 1)]
    assert infos["lives"][::2].tolist() == list(range(1, len(infos) + 1, 2))
    assert infos["lives"][1::2].isnan().all()


def test_what_is_not_finite_is_kept_and_counted() -> None:
    class Broken(World):
        steps = 0

        def step(self, action: Any) -> Any:
            observation, reward, *rest = super().step(action)
            self.steps += 1
            if self.steps % 10 == 0:
                observation[1] = np.nan
            return observation, np.inf if self.steps % 15 == 0 else reward, *rest

    with make_collector(Broken) as collector:
        batches = [batch.clone() for batch in itertools.islice(collector, 3)]
        stats = collector.stats()
    assert sum(int(batch["next", "observation"].isnan().sum()) for batch in batches) == 19
    assert sum(int(batch["next", "reward"].isinf().sum()) for batch in batches) == 12
    assert stats.non_finite == 19 + 12 - 6


# -- policies ----------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Adds up what it observes."""

    def forward(self, observation: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        total = total * 0.5 + observation
        return (total.sum(-1) * 1000).long() % 4, total


@pytest.mark.parametrize("out_key", ["total", ("next", "total")])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_recurrent_states_are_carried_from_step_to_step(num_workers: int, out_key: Any) -> None:
    policy = TensorDictModule(Recurrent(), in_keys=["observation", "total"], out_keys=["action", out_key])
    start = torch.tensor([1.0, 2.0, 3.0])
    batches = collect(
        [World, AsyncWorld, World, lambda: SyncVectorEnv([Relaxed] * 2), AsyncWorld],
        num_workers=num_workers,
        policy=policy,
        state_keys={"total": start},
    )
    totals: dict[int, Tensor] = {}
    for batch in batches:
        for fragment in batch.unbind(0):
            env = int(fragment["collector", "env"][0])
            for step in fragment.unbind(0):
                total = start if step["is_init"] else totals[env]
                torch.testing.assert_close(step["total"], total, atol=0, rtol=0)
                action, totals[env] = Recurrent()(step["observation"], step["total"])
                assert step["action"] == action
    assert len(totals) == 6


class Relaxed(World):
    def step(self, action: Any) -> Any:
        return super().step(int(action))


def test_a_policy_that_reads_is_init_is_told() -> None:
    policy = TensorDictModule(
        lambda observation, is_init: (torch.zeros(len(observation), dtype=torch.int64), is_init),
        in_keys=["observation", "is_init"],
        out_keys=["action", "was_init"],
    )
    for batch in collect([World, AsyncWorld] * 2, policy=policy):
        assert torch.equal(batch["was_init"], batch["is_init"])
        assert torch.equal(batch["is_init"][..., 0], batch["collector", "step"] == 0)


def test_the_exploration_mode_is_that_of_the_collector() -> None:
    policy = TensorDictSequential(
        TensorDictModule(
            nn.Sequential(nn.Linear(3, 2), NormalParamExtractor()), in_keys=["observation"], out_keys=["loc", "scale"]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=torch.distributions.Normal
        ),
    )

    class Continuous(World):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

        def step(self, action: Any) -> Any:
            return super().step(0)

    for mode, is_mean in ((None, False), (InteractionType.DETERMINISTIC, True), ("random", False), ("mean", True)):
        (batch,) = collect(Continuous, 1, policy=policy, exploration_type=mode)
        assert torch.equal(batch["action"], batch["loc"]) is is_mean


# -- random steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_steps_are_exact_and_marked(num_workers: int) -> None:
    def run() -> list[Any]:
        makes = [World, AsyncWorld, lambda: SyncVectorEnv([Relaxed] * 2, autoreset_mode=AutoresetMode.NEXT_STEP), World]
        return collect(makes, 8, init_random_frames=103, num_workers=num_workers)

    batches = run()
    steps: Any = torch.cat([batch.reshape(-1) for batch in batches])
    at_random = steps[steps["collector", "random"]]
    assert len(at_random) == 103
    assert (at_random["policy_version"] == -1).all()
    assert not at_random["score"].any()
    assert set(at_random["action"].tolist()) == {0, 1, 2, 3}
    asked = steps[~steps["collector", "random"]]
    assert (asked["policy_version"] == 0).all()
    torch.testing.assert_close(asked["score"], asked["observation"].sum(-1) * 1000)
    for env in range(5):  # each begins with its share, and is then asked
        marks = steps[steps["collector", "env"] == env]["collector", "random"].tolist()
        assert marks == sorted(marks, reverse=True)
        assert sum(marks) in (20, 21)
    again: Any = torch.cat([batch.reshape(-1) for batch in run()])
    for env in range(5):
        drawn = [run["action"][run["collector", "random"] & (run["collector", "env"] == env)] for run in (steps, again)]
        assert torch.equal(*drawn)


# -- who gets it -------------------------------------------------------------------------------------------


def test_batches_are_post_processed_and_handed_to_a_replay_buffer() -> None:
    class Buffer:
        def __init__(self) -> None:
            self.got: list[TensorDictBase] = []

        def extend(self, data: TensorDictBase) -> None:
            self.got.append(data.clone())

    buffer = Buffer()
    seen: list[TensorDictBase] = []

    def double(batch: TensorDictBase) -> TensorDictBase:
        return batch.set("twice", batch["next", "reward"] * 2)

    with make_collector(
        num_envs=5, total_frames=150, replay_buffer=buffer, postproc=double, post_collect_hook=seen.append
    ) as collector:
        assert list(collector) == [None, None, None]
    assert [len(data) for data in buffer.got] == [64, 64, 22]
    assert [batch.batch_size for batch in seen] == [(8, 8), (8, 8), (3, 8)]
    for data in buffer.got:
        assert torch.equal(data["twice"], data["next", "reward"] * 2)
        assert data["collector", "mask"].all()


def test_whole_episodes_of_workers_are_yielded_where_asked() -> None:
    batches = collect(World, None, num_envs=3, num_workers=1, yield_completed_trajectories=True, total_frames=300)
    assert sum(map(len, batches)) >= 300
    policy = make_policy()
    loops = {env: plain_steps(World, env_seed(make_entropy(3), env, 0), policy) for env in range(3)}
    assert all(len(batch) >= 64 for batch in batches[:-1])
    for batch in batches:
        assert batch["is_init"][0]
        assert batch["next", "done"][-1]
        starts = batch["is_init"][1:, 0]
        assert torch.equal(starts, batch["next", "done"][:-1, 0])
        for env, step in zip(batch["collector", "env"].tolist(), as_steps(batch), strict=True):
            assert_equal(step, next(loops[env]))


# -- pause and figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("makes", [[World] * 4, [AsyncWorld, World], [lambda: SyncVectorEnv([Relaxed] * 2)]])
def test_nothing_steps_inside_a_pause(makes: list[Any]) -> None:
    counts = [0]

    def counting(make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> Any:
            env = make()
            step = env.step

            def count(action: Any) -> Any:
                counts[0] += 1
                return step(action)

            async def acount(action: Any) -> Any:
                counts[0] += 1
                return await step(action)

            env.step = acount if isinstance(env, AsyncWorld) else count
            return env

        return made

    with make_collector([counting(make) for make in makes], max_batches_ahead=50) as collector:
        batches = map(TensorDictBase.clone, collector)
        found = [next(batches)]
        with collector.pause():
            before = counts[0]
            for _ in range(20):
                collector.update_weights()
            assert counts[0] == before
        found += itertools.islice(batches, 8)
        assert counts[0] > before
    assert_plain(steps_by_env(found), seed=3)


def test_figures_of_episodes_and_frames_are_true() -> None:
    with make_collector(num_envs=4, total_frames=640) as collector:
        batches = [batch.clone() for batch in collector]
        stats = collector.stats()
    ended = [int(batch["next", "done"].sum()) for batch in batches]
    assert stats.frames == 640
    assert stats.batches == len(batches) == 10
    assert stats.episodes >= sum(ended)
    assert stats.episode_length is not None
    assert 3 < stats.episode_length < 30
    assert stats.episode_return is not None
    assert set(stats.step_seconds) <= set(range(4))
    assert stats.frames_per_second > 0
    assert sum(stats.shares.values()) == pytest.approx(1)
    assert stats.limited_by in stats.shares
    assert (stats.restarts, stats.retired, stats.timeouts, stats.non_finite) == ({}, {}, 0, 0)


def test_the_return_of_an_episode_is_the_sum_of_its_rewards() -> None:
    class Steady(World):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def step(self, action: Any) -> Any:
            self.steps += 1
            return self._observe(), 0.5, self.steps % 7 == 0, False, {}

    with make_collector(Steady, num_envs=3, total_frames=640) as collector:
        list(collector)
        stats = collector.stats()
    assert (stats.episode_return, stats.episode_length) == (3.5, 7)
