"""Environments and a policy that can be computed by hand, and the plain loop that a collector must equal."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer.collectors.seeds import env_seed, make_entropy


class World(gymnasium.Env[Any, Any]):
    """Observations are random, mixed with the actions that were taken. Episodes end at random, in both ways."""

    def __init__(self, ends: float = 0.1) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(4)
        self.ends = ends
        self.sum = 0

    def _observe(self) -> Any:
        return np.array([self.sum, *self.np_random.random(2)], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.sum = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        assert isinstance(action, (int, np.integer))
        self.sum = (self.sum * 3 + action) % 1000
        draw = self.np_random.random()
        terminated, truncated = draw < self.ends, self.ends / 2 < draw < 1.5 * self.ends
        return self._observe(), float(self.sum % 7), terminated, truncated, {}


class AsyncWorld:
    """The same, for an event loop."""

    def __init__(self, ends: float = 0.1) -> None:
        self.world = World(ends)
        self.observation_space, self.action_space = self.world.observation_space, self.world.action_space
        self.closed = False

    async def reset(self, *, seed: int | None = None) -> Any:
        await asyncio.sleep(0)
        return self.world.reset(seed=seed)

    async def step(self, action: Any) -> Any:
        await asyncio.sleep(0)
        return self.world.step(action)

    async def close(self) -> None:
        self.closed = True


class Act(nn.Module):
    """Chooses an action by the observation alone, and returns a value of it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        scores = observation.sum(-1) * 1000 + self.shift
        return scores.long() % 4, scores


def make_policy() -> TensorDictModule:
    return TensorDictModule(Act(), in_keys=["observation"], out_keys=["action", "score"])


Step = dict[str, Any]


def plain_steps(make: Callable[[], Any], seed: int, policy: TensorDictModule) -> Iterator[Step]:
    """What the loop yields that everybody writes first."""
    env = make()
    observation, _ = env.reset(seed=seed)
    first, episode_step = True, 0
    while True:
        chosen, score = policy.module(torch.from_numpy(observation)[None])
        action = int(chosen)
        following, reward, terminated, truncated, _ = env.step(action)
        yield {
            "observation": observation,
            "action": action,
            "score": float(score),
            "is_init": first,
            "reward": np.float32(reward),
            "next": following,
            "terminated": bool(terminated),
            "truncated": bool(truncated and not terminated),
            "step": episode_step,
        }
        first, episode_step = bool(terminated or truncated), episode_step + 1
        observation = following
        if first:
            observation, _ = env.reset()
            episode_step = 0


def steps_by_env(batches: Sequence[TensorDictBase]) -> dict[int, list[Step]]:
    """The valid steps of batches ``[B, T]`` by environment, in the order in which they were delivered."""
    found: defaultdict[int, list[Step]] = defaultdict(list)
    for batch in batches:
        masks, envs = batch["collector", "mask"], batch["collector", "env"]
        assert bool((masks.int().diff() <= 0).all()), "steps are valid up to a cut, and none behind it"
        assert bool((envs == envs[:, :1]).all()), "a fragment is of one environment"
        steps = iter(as_steps(batch[masks]))
        for env, length in zip(envs[:, 0].tolist(), masks.sum(-1).tolist(), strict=True):
            found[env].extend(itertools.islice(steps, length))
    return dict(found)


def as_steps(td: TensorDictBase) -> list[Step]:
    """Steps in a TensorDict ``[N]``."""
    following = td["next"]
    assert torch.equal(following["done"], following["terminated"] | following["truncated"])
    assert not any(td[key].any() for key in ("done", "terminated", "truncated"))
    columns: dict[str, Any] = {
        "observation": td["observation"].numpy(),
        "action": td["action"].tolist(),
        "score": td["score"].tolist(),
        "is_init": td["is_init"][:, 0].tolist(),
        "reward": following["reward"][:, 0].numpy(),
        "next": following["observation"].numpy(),
        "terminated": following["terminated"][:, 0].tolist(),
        "truncated": following["truncated"][:, 0].tolist(),
        "step": td["collector", "step"].tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def assert_equal(found: Step, expected: Step) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value), f"{key}: {found[key]}, expected {value}"


def assert_plain(steps: dict[int, list[Step]], *, seed: int, make: Callable[[], Any] = World) -> None:
    """Every environment has lived through what a plain loop lives through, from its beginning, without a gap."""
    policy = make_policy()
    for env, found in steps.items():
        expected = plain_steps(make, env_seed(make_entropy(seed), env, 0), policy)
        for one in found:
            assert_equal(one, next(expected))


def assert_plain_with_restarts(steps: dict[int, list[Step]], *, seed: int, make: Callable[[], Any] = World) -> int:
    """The same, where environments were made again meanwhile, each time with another seed; returns how often.

    The last complete step before that is the last of its episode, unless it was in an earlier fragment.
    """
    policy, restarts = make_policy(), 0
    for env, found in steps.items():
        incarnation, last = 0, None
        plain = plain_steps(make, env_seed(make_entropy(seed), env, 0), policy)
        for number, one in enumerate(found):
            expected = next(plain)
            while not is_equal(one, expected):
                following = found[number + 1] if number + 1 < len(found) else None
                if is_equal({**one, "truncated": False}, expected) and (following is None or following["is_init"]):
                    break  # cut off behind this step
                assert one["is_init"], f"environment {env} has lost steps before its step {number}"
                assert last is None or last["terminated"] or last["truncated"] or last["fragment_ended"]
                incarnation, restarts = incarnation + 1, restarts + 1
                assert incarnation < 1000
                plain = plain_steps(make, env_seed(make_entropy(seed), env, incarnation), policy)
                expected = next(plain)
            last = {**one, "fragment_ended": True}
    return restarts


def collect_until_made_again(batches: Iterable[TensorDictBase], *, seed: int, env: int = 0) -> list[TensorDictBase]:
    """Copies of batches up to one that has the first step of an environment since it was made again."""
    first, _ = World().reset(seed=env_seed(make_entropy(seed), env, 1))
    copies = []
    for batch in batches:
        copies.append(batch.clone())
        if (batch["observation"][batch["collector", "env"] == env] == torch.from_numpy(first)).all(-1).any():
            break
    return copies


def is_equal(found: Step, expected: Step) -> bool:
    try:
        assert_equal(found, expected)
    except AssertionError:
        return False
    return True


class Gate:
    """Lets a test decide when something goes on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        self.open.wait()
