"""Environments of several kinds, as rows that one thread steps."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import iscoroutinefunction
from typing import Any

from aioinfer.collectors.environments.base import Abandoned, Stepper
from aioinfer.collectors.environments.envpool import EnvPoolStepper
from aioinfer.collectors.environments.parallel import ParallelStepper
from aioinfer.collectors.environments.serial import SerialStepper
from aioinfer.collectors.environments.torchrl_env import TorchRLStepper
from aioinfer.collectors.environments.vector import VectorStepper
from aioinfer.collectors.spaces import InfoKeys
from aioinfer.collectors.watch import Watch

__all__ = ["Abandoned", "SerialStepper", "Stepper", "is_async", "is_several", "make_stepper"]


def make_stepper(envs: Sequence[Any], watch: Watch, info_keys: InfoKeys = ()) -> Stepper:
    """Make what steps these environments.

    Args:
        envs: of one environment each, and of equal layouts; or one that is of several.
        watch: where calls of environments are announced.
        info_keys: entries of infos to store.

    Raises:
        TypeError: an object is no environment of a known kind, or a space has no fixed layout.
        ValueError: layouts are not equal, or there are several objects and one of them is of several environments.
    """
    first = envs[0]
    several = next((env for env in envs if is_several(env)), None)
    if several is not None and len(envs) > 1:
        raise ValueError(f"{several} is of several environments, so that it is a group by itself; got {len(envs)}")
    if hasattr(first, "step_and_maybe_reset"):
        return TorchRLStepper(envs, watch, info_keys)
    if hasattr(first, "agent_iter"):
        raise TypeError(f"agents of {first} take turns; make a parallel environment of it (aec_to_parallel)")
    if hasattr(first, "possible_agents"):
        return ParallelStepper(first, watch, info_keys)
    if several is not None:
        if not hasattr(first, "async_reset"):
            return VectorStepper(first, watch, info_keys)
        if first.is_async:
            return EnvPoolStepper(first, watch, info_keys)
        return VectorStepper(first, watch, info_keys, seeded=False)
    for env in envs:
        _check_single(env)
    return SerialStepper(envs, watch, info_keys)


def _check_single(env: Any) -> None:
    if hasattr(env, "num_envs") or hasattr(env, "async_reset"):
        raise TypeError(
            f"{env!r} is of several environments, but has no single_observation_space as vector environments of "
            "Gymnasium have; EnvPool makes one with env_type='gymnasium'"
        )
    for name in ("observation_space", "action_space", "reset", "step"):
        if not hasattr(env, name):
            raise TypeError(f"{env!r} is no environment of a known kind: it has no {name}")


def is_several(env: Any) -> bool:
    """Whether an object is of several environments, so that it is a group by itself."""
    if hasattr(env, "step_and_maybe_reset"):
        return len(env.batch_size) > 0
    if hasattr(env, "possible_agents"):
        return True
    return hasattr(env, "num_envs") and hasattr(env, "single_observation_space")


def is_async(env: Any) -> bool:
    """Whether ``reset`` and ``step`` of an environment are coroutine functions."""
    return iscoroutinefunction(getattr(env, "reset", None)) and iscoroutinefunction(getattr(env, "step", None))
