"""The environments that collectors step. What the workers of a collector make is a function of this module."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

_MODULES = {"CartPole": "gymnasium", "Pong": "ale_py", "EnvPool": "envpool", "sleeping": "gymnasium"}

_PACE = 0.005
_SLOWER = 20
_SLEEPING_STEPS = 50  # of an episode

PONG = (210, 160)
"""The shape of an observation of Pong, which is uint8."""


def load(environment: str) -> None:
    """Import the package of the environments."""
    import_module(_MODULES[environment])


def factory(environment: str) -> Callable[[], Any]:
    """The function that makes one environment of Gymnasium."""
    return {"CartPole": make_cartpole, "Pong": make_pong}[environment]


def make_cartpole() -> Any:
    """Gymnasium's CartPole as users make it."""
    import gymnasium

    return gymnasium.make("CartPole-v1")


def make_torchrl_cartpole() -> Any:
    """torchrl's, with an integer as action."""
    from torchrl.envs import GymEnv

    return GymEnv("CartPole-v1", categorical_action_encoding=True)


def make_pong() -> Any:
    """Four frames of the emulator in a step, of which the observation is the last one, in grey."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    return gymnasium.make("ALE/Pong-v5", obs_type="grayscale")


def make_envpool_cartpole(num_envs: int = 256) -> Any:
    """EnvPool's, of which the half is stepped at once."""
    import envpool

    return envpool.make_gymnasium("CartPole-v1", num_envs=num_envs, batch_size=num_envs // 2)


class SleepingEnvironment:
    """An environment that awaits in each step, for a time of its own: 5 ms in the mean, or 100 ms if it is the first.

    Args:
        number: of the environment.
    """

    def __init__(self, number: int) -> None:
        from gymnasium.spaces import Box, Discrete

        self.observation_space = Box(-1, 1, (4,), np.float32)
        self.action_space = Discrete(2)
        self.metadata: dict[str, Any] = {}
        self._mean = _PACE if number else _PACE * _SLOWER
        self._random = random.Random(number)
        self._steps = 0

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode."""
        self._steps = 0
        return self._observation(), {}

    async def step(self, action: Any) -> Any:
        """Step when its time has passed."""
        await asyncio.sleep(self._mean * self._random.uniform(0.5, 1.5))
        self._steps += 1
        return self._observation(), 1.0, self._steps == _SLEEPING_STEPS, False, {}

    def close(self) -> None:
        """Do nothing."""

    def _observation(self) -> Any:
        return np.full(4, self._steps / _SLEEPING_STEPS, np.float32)
