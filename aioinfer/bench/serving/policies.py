"""A robot's policy, and its observations."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from aioinfer.bench.models import Policy
from aioinfer.bench.workloads import Protocol, Serving, Workload, named

__all__ = ["ACTIONS_SHAPE", "WORKLOAD_VARIABLE", "make_observation", "make_policy", "make_served_policy"]

WORKLOAD_VARIABLE = "AIOINFER_BENCH_WORKLOAD"
"""Of the environment: the workload for which :func:`make_served_policy` makes a policy."""

ACTIONS_SHAPE = (10, 7)
"""The actions of one reply: a horizon of 10, for 7 joints."""
_IMAGES = ("observation/image", "observation/wrist_image")
_IMAGE_SHAPE = (224, 224, 3)


def make_observation(serving: Serving) -> dict[str, Any]:
    """What a robot sends: its state, and perhaps two images."""
    observation: dict[str, Any] = {"observation/state": np.zeros(8, np.float32)}
    if serving.images:
        observation |= {name: np.random.randint(256, size=_IMAGE_SHAPE, dtype=np.uint8) for name in _IMAGES}
    return observation


def _make_robot_policy(serving: Serving) -> TensorDictModule:
    """A policy that reads all of an observation, and takes as long as ``serving`` says for any batch."""

    def act(state: Tensor, *_: Tensor) -> Tensor:
        if serving.pass_time:
            time.sleep(serving.pass_time)
        return torch.zeros(*state.shape[:-1], *ACTIONS_SHAPE)

    images = _IMAGES if serving.images else ()
    return TensorDictModule(act, in_keys=["observation/state", *images], out_keys=["actions"])


def make_policy(workload: Workload) -> TensorDictModule:
    """The policy that is served."""
    assert workload.serving is not None
    if workload.serving.protocol is Protocol.OPENPI:
        return _make_robot_policy(workload.serving)
    return Policy(workload.model).module


def make_served_policy() -> TensorDictModule:
    """The policy of the workload that the environment names, for ``aioinfer serve``."""
    torch.set_num_threads(1)
    return make_policy(named(os.environ[WORKLOAD_VARIABLE]))
