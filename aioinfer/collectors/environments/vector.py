"""A Gymnasium vector environment, in each of its three ways to begin another episode."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.environments.base import FAILED
from aioinfer.collectors.environments.joint import JointStepper
from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.spaces import (
    Column,
    InfoKeys,
    action_columns,
    batched_action_writer,
    env_layout,
    info_columns,
    observation_columns,
)
from aioinfer.collectors.watch import Phase, Watch

__all__ = ["VectorStepper"]


class VectorStepper(JointStepper):
    """Steps one vector environment, which is one member; its environments are the rows.

    ``env.metadata["autoreset_mode"]`` says how it resets; without that entry it is ``NEXT_STEP``. Rows that such a
    step resets have no transition: they are not ``ready`` before it, and not ``stepped`` by it.

    A vector environment steps all its rows at once: a step is made as soon as all of them have an action or are to be
    reset.

    Args:
        env: of Gymnasium's ``VectorEnv`` interface.
        watch: where calls are announced.
        info_keys: entries of infos to store.
        seeded: whether its ``reset`` takes seeds.

    Raises:
        TypeError: a space has no fixed layout.
        ValueError: the autoreset mode is an unknown one.
    """

    def __init__(self, env: Any, watch: Watch, info_keys: InfoKeys = (), *, seeded: bool = True) -> None:
        rows = int(env.num_envs)
        observation_space, action_space = env.single_observation_space, env.single_action_space
        layout = env_layout(observation_space, action_space, info_keys)
        columns = action_columns(action_space)
        super().__init__(env, rows, layout, watch, RandomActions(columns, [action_space] * rows))
        self._mode = _autoreset_mode(env)
        self.is_uneven = self._mode == "next step"
        self._seeded = seeded
        self._info_keys = info_keys
        self._columns = observation_columns(observation_space)
        self._info_columns = info_columns(layout.info)
        self._write_actions = batched_action_writer(action_space)
        self._every_row = np.arange(rows)
        self._turn = 0

    def _adopt(self, env: Any, seeds: Sequence[int]) -> None:
        layout = env_layout(env.single_observation_space, env.single_action_space, self._info_keys)
        if (layout, int(env.num_envs)) != (self.layout, self.size):
            raise ValueError(
                f"the new environment has {env.num_envs} rows of layout {layout}, the one before had {self.size} of "
                f"{self.layout}"
            )
        self._mode = _autoreset_mode(env)
        for row, seed in enumerate(seeds):
            self._random.seed(row, int(seed), env.single_action_space)

    def _first_reset(self, seeds: list[int]) -> None:
        result = self._call_reset(seeds)
        if result is FAILED:
            return
        try:
            observations, _ = result
            for column, out in zip(self._columns, self.observations, strict=True):
                out[...] = column.read(observations, self.size)
        except Exception as error:  # values of the user's may raise anything
            self._fail(0, error)
        self.is_init[:] = True

    def _call_reset(self, seeds: list[int]) -> Any:
        reset = self._envs[0].reset
        if not self._seeded:
            return self._call(0, Phase.RESET, reset)
        result = self._call(0, Phase.RESET, reset, seed=seeds)
        if result is FAILED and "seed" in str(self.failures[-1][1]).lower():
            self.failures.clear()  # one that has a single generator for all rows takes one seed only
            result = self._call(0, Phase.RESET, reset, seed=seeds[0])
        return result

    def _step(self) -> None:
        self._turn += 1
        began = monotonic()
        result = self._call(0, Phase.STEP, self._envs[0].step, self._write_actions(self._actions))
        if result is FAILED:
            return
        self.sample = self._turn % self.size, monotonic() - began
        try:
            observations, rewards, terminated, truncated, infos = result
            ended = self._store(
                [column.read(observations, self.size) for column in self._columns],
                np.asarray(rewards, np.float32).reshape(self.size),
                np.asarray(terminated, np.bool_).reshape(self.size),
                np.asarray(truncated, np.bool_).reshape(self.size),
                infos,
            )
        except Exception as error:  # values of the user's may raise anything
            self._fail(0, error)
            return
        if self._mode == "next step":
            self._absent[:] = ended
        elif self._mode == "disabled" and ended.any():
            self._reset_ended(ended)

    def _store(
        self,
        observations: list[NDArray[Any]],
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        infos: Any,
    ) -> NDArray[np.bool_]:
        """Write what a step has returned into the arrays, and say which rows it has ended."""
        stepped = ~self._absent
        ended = (terminated | truncated) & stepped
        every = bool(stepped.all())
        where: Any = ... if every else stepped
        for out, array in zip(self.next_observations, observations, strict=True):
            out[where] = array[where]
        for out, array in zip(self.observations, observations, strict=True):
            out[...] = array
        self.is_init[:] = self._absent
        from_last_step = stepped
        if self._mode == "same step" and ended.any():
            self._store_final(infos, ended)
            self.is_init |= ended
            from_last_step = stepped & ~ended
        for column, out in zip(self._info_columns, self.info, strict=True):
            _store_infos(column, infos, from_last_step, out)
        self.reward[where] = rewards[where]
        self.terminated[where] = terminated[where]
        self.truncated[where] = (truncated & ~terminated)[where]
        self._has_action[:] = False
        self._absent[:] = False
        if every or stepped.any():
            self.stepped = self._every_row if every else np.flatnonzero(stepped)
        return ended

    def _store_final(self, infos: Any, ended: NDArray[np.bool_]) -> None:
        """Store the last observations and infos of episodes, beside which the first ones of the next were returned."""
        final = infos["final_obs"] if "final_obs" in infos else infos["final_observation"]
        for column, out in zip(self._columns, self.next_observations, strict=True):
            for row in np.flatnonzero(ended).tolist():
                column.put(_take(final, row), out, row)
        final_infos = infos.get("final_info", {})
        for column, out in zip(self._info_columns, self.info, strict=True):
            if isinstance(final_infos, dict):
                _store_infos(column, final_infos, ended, out)
            else:
                for row in np.flatnonzero(ended).tolist():
                    column.put(final_infos[row], out, row)

    def _reset_ended(self, ended: NDArray[np.bool_]) -> None:
        result = self._call(0, Phase.RESET, self._envs[0].reset, options={"reset_mask": ended.copy()})
        if result is FAILED:
            return
        try:
            observations, _ = result
            for column, out in zip(self._columns, self.observations, strict=True):
                out[ended] = column.read(observations, self.size)[ended]
        except Exception as error:  # values of the user's may raise anything
            self._fail(0, error)
        self.is_init |= ended


def _autoreset_mode(env: Any) -> Literal["next step", "same step", "disabled"]:
    mode = (env.metadata or {}).get("autoreset_mode") or "next step"
    match getattr(mode, "value", mode).lower().replace("_", "").replace(" ", ""):
        case "nextstep":
            return "next step"
        case "samestep":
            return "same step"
        case "disabled":
            return "disabled"
    raise ValueError(f"the autoreset mode of {env} is {mode!r}, expected NEXT_STEP, SAME_STEP or DISABLED")


def _take(batch: Any, row: int) -> Any:
    """One row of a batch of observations, which is an array, or a dictionary or tuple of arrays."""
    if isinstance(batch, dict):
        return {key: _take(value, row) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_take(value, row) for value in batch)
    return batch[row]


def _store_infos(column: Column, infos: dict[str, Any], rows: NDArray[np.bool_], out: NDArray[Any]) -> None:
    key = column.spec.path[-1]
    values: Any = infos.get(key)
    present = infos.get(f"_{key}")
    for row in np.flatnonzero(rows).tolist():
        known = values is not None and (present is None or present[row])
        column.put({key: values[row]} if known else {}, out, row)
