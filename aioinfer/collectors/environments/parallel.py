"""A PettingZoo environment of the parallel interface, whose agents are rows."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

import numpy as np

from aioinfer.collectors.environments.base import FAILED
from aioinfer.collectors.environments.joint import JointStepper
from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.spaces import (
    ArraySpec,
    Column,
    EnvLayout,
    InfoKeys,
    action_columns,
    env_layout,
    info_columns,
    observation_columns,
    row_action_writer,
)
from aioinfer.collectors.watch import Phase, Watch

__all__ = ["ParallelStepper"]

_REWARD = Column(ArraySpec(("next", "reward"), (), np.dtype(np.float32)))


class ParallelStepper(JointStepper):
    """Steps one environment of PettingZoo's ``ParallelEnv`` interface; ``possible_agents`` are the rows, in that order.

    A row whose agent has ended, or has not come yet, is not ``ready``. The environment is reset, and all its agents
    begin another episode, when none of them is left.

    Args:
        env: its agents have spaces of equal layout.
        watch: where calls are announced.
        info_keys: entries of infos to store.

    Raises:
        TypeError: a space has no fixed layout.
        ValueError: the layouts are not equal.
    """

    is_uneven = True

    def __init__(self, env: Any, watch: Watch, info_keys: InfoKeys = ()) -> None:
        self._info_keys = info_keys
        self._agents = list(env.possible_agents)
        layout = self._layout_of(env)
        first = self._agents[0]
        spaces = [env.action_space(agent) for agent in self._agents]
        super().__init__(env, len(spaces), layout, watch, RandomActions(action_columns(spaces[0]), spaces))
        self._columns = observation_columns(env.observation_space(first))
        self._info_columns = info_columns(layout.info)
        self._write_actions = row_action_writer(spaces[0])

    def _layout_of(self, env: Any) -> EnvLayout:
        layouts = [
            env_layout(env.observation_space(agent), env.action_space(agent), self._info_keys) for agent in self._agents
        ]
        for agent, layout in zip(self._agents, layouts, strict=True):
            if layout != layouts[0]:
                raise ValueError(
                    f"agent {agent!r} has the layout {layout}, agent {self._agents[0]!r} has {layouts[0]}; "
                    "agents of one environment must have spaces of equal layout"
                )
        return layouts[0]

    def _adopt(self, env: Any, seeds: Sequence[int]) -> None:
        if list(env.possible_agents) != self._agents:
            raise ValueError(
                f"the new environment has the agents {env.possible_agents}, the one before had {self._agents}"
            )
        layout = self._layout_of(env)
        if layout != self.layout:
            raise ValueError(f"the new environment has the layout {layout}, the one before had {self.layout}")
        for row, (agent, seed) in enumerate(zip(self._agents, seeds, strict=True)):
            self._random.seed(row, int(seed), env.action_space(agent))

    def _first_reset(self, seeds: list[int]) -> None:
        self._store_first(self._call(0, Phase.RESET, self._envs[0].reset, seed=seeds[0]))

    def _store_first(self, result: Any) -> None:
        """Store what a reset has returned."""
        if result is FAILED:
            return
        try:
            observations, _ = result
            agents = set(self._envs[0].agents)
            if not agents:
                raise ValueError("reset() has left no agents")
            self._has_action[:] = False
            for row, agent in enumerate(self._agents):
                self._absent[row] = agent not in agents
                if agent in agents:
                    self._store_observation(observations[agent], row)
        except Exception as error:  # values of the user's may raise anything
            self._fail(0, error)

    def _store_observation(self, observation: Any, row: int) -> None:
        for column, out in zip(self._columns, self.observations, strict=True):
            column.put(observation, out, row)
        self.is_init[row] = True

    def _step(self) -> None:
        env = self._envs[0]
        rows = np.flatnonzero(self._has_action)
        acting = [self._agents[row] for row in rows.tolist()]
        actions = dict(zip(acting, self._write_actions([leaf[rows] for leaf in self._actions]), strict=True))
        began = monotonic()
        result = self._call(0, Phase.STEP, env.step, actions)
        if result is FAILED:
            return
        self.sample = int(rows[0]), monotonic() - began
        try:
            observations, rewards, terminated, truncated, infos = result
            agents = set(env.agents)
            self._has_action[:] = False
            for row, agent in enumerate(self._agents):
                if agent not in actions:
                    came = agent in agents and agent in observations
                    if came:
                        self._store_observation(observations[agent], row)
                    self._absent[row] = not came
                    continue
                if agent not in observations:
                    raise ValueError(f"step() has returned no observation of {agent!r}, who had an action")
                for column, out in zip(self._columns, self.next_observations, strict=True):
                    column.put(observations[agent], out, row)
                for column, out in zip(self._info_columns, self.info, strict=True):
                    column.put(infos.get(agent, {}), out, row)
                _REWARD.put(rewards[agent], self.reward, row)
                self.terminated[row] = bool(terminated[agent])
                self.truncated[row] = bool(truncated[agent]) and not self.terminated[row]
                self._absent[row] = self.terminated[row] or self.truncated[row] or agent not in agents
                self.is_init[row] = False
        except Exception as error:  # values of the user's may raise anything
            self._fail(0, error)
            return
        for next_observations, out in zip(self.next_observations, self.observations, strict=True):
            out[rows] = next_observations[rows]
        self.stepped = rows
        if self._absent.all():
            self._store_first(self._call(0, Phase.RESET, env.reset))
