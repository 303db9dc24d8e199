"""One environment whose rows step together: actions wait until the last row has its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.environments.base import NO_ROWS, Stepper
from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.spaces import Column, EnvLayout
from aioinfer.collectors.watch import Watch

__all__ = ["JointStepper"]


class JointStepper(Stepper):
    """Steps one member of several rows, as soon as each of them has an action or takes none."""

    def __init__(self, env: Any, rows: int, layout: EnvLayout, watch: Watch, random: RandomActions) -> None:
        super().__init__([env], [rows], layout, watch, random)
        self.min_rows = rows
        self._actions = [Column(spec).empty(rows) for spec in layout.action]
        self._has_action = np.zeros(rows, np.bool_)
        self._absent = np.zeros(rows, np.bool_)
        """Rows for whom the next step takes no action."""

    def reset(self, seeds: Sequence[int]) -> None:
        self._begin()
        for row, seed in enumerate(seeds):
            self._random.seed(row, int(seed))
        self._reset([int(seed) for seed in seeds])

    def step(self, rows: NDArray[np.int64], actions: Sequence[NDArray[Any]]) -> None:
        self._begin()
        self._go_on = self._finish
        self._ready_changed = True
        self._has_action[rows] = True
        for leaf, action in zip(self._actions, actions, strict=True):
            leaf[rows] = action
        if (self._has_action | self._absent).all():
            self._step()
            if self._absent.all() and not self.failures:
                self._step()  # nobody has an action to give
        self._finish()

    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None:
        self._begin()
        self._envs[member] = env
        try:
            self._adopt(env, seeds)
        except Exception as error:  # code of the user's may raise anything
            self._fail(member, error)
            self._finish()
            return
        self._reset([int(seed) for seed in seeds])

    def _waiting_rows(self) -> NDArray[np.int64]:
        return NO_ROWS if self._envs[0] is None else np.flatnonzero(~(self._has_action | self._absent))

    def _reset(self, seeds: list[int]) -> None:
        self._go_on = self._finish
        self._ready_changed = True
        self._has_action[:] = False
        self._absent[:] = False
        self._first_reset(seeds)
        self._finish()

    @abstractmethod
    def _adopt(self, env: Any, seeds: Sequence[int]) -> None:
        """Check that a new environment is like the one before, and draw random actions from its spaces."""

    @abstractmethod
    def _first_reset(self, seeds: list[int]) -> None:
        """Reset the environment with these seeds."""

    @abstractmethod
    def _step(self) -> None:
        """Step the environment with the actions that there are."""
