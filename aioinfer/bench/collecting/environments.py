"""The environments that collectors step. What the workers of a collector make is a function of this module."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_MODULES = {"CartPole": "gymnasium", "Pong": "ale_py", "EnvPool": "envpool", "sleeping": "gymnasium"}

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
