"""An environment for the tests of the demo that falls when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np


class ScriptedEnv:
    """Stands in for CartPole: observations count the steps, and ``at_step`` says whether one ends the episode."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, at_step: Callable[[int], tuple[bool, bool]]) -> None:
        self._at_step = at_step
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        terminated, truncated = self._at_step(self._steps)
        return np.full(4, self._steps, np.float32), 1.0, terminated, truncated, {}

    def close(self) -> None:
        pass
