"""A robot's policy, and its observations."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from aioinfer.bench.workloads import Serving

__all__ = ["ACTIONS_SHAPE", "make_observation", "make_robot_policy"]

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


def make_robot_policy(serving: Serving) -> TensorDictModule:
    """A policy that reads all of an observation, and takes as long as ``serving`` says for any batch."""

    def act(state: Tensor, *_: Tensor) -> Tensor:
        if serving.pass_time:
            time.sleep(serving.pass_time)
        return torch.zeros(*state.shape[:-1], *ACTIONS_SHAPE)

    images = _IMAGES if serving.images else ()
    return TensorDictModule(act, in_keys=["observation/state", *images], out_keys=["actions"])
