"""Gymnasium environments that one thread steps one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.environments.base import FAILED, Abandoned, Stepper
from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.spaces import (
    ArraySpec,
    Column,
    InfoKeys,
    action_columns,
    env_layout,
    info_columns,
    observation_columns,
    row_action_writer,
)
from aioinfer.collectors.watch import Phase, Watch

__all__ = ["SerialStepper"]


class SerialStepper(Stepper):
    """Steps environments of Gymnasium's interface, each of which is a member and a row.

    Args:
        envs: of equal layouts.
        watch: where calls are announced.
        info_keys: entries of infos to store.

    Raises:
        TypeError: a space has no fixed layout.
        ValueError: the layouts are not equal.
    """

    def __init__(self, envs: Sequence[Any], watch: Watch, info_keys: InfoKeys = ()) -> None:
        first = envs[0]
        layout = env_layout(first.observation_space, first.action_space, info_keys)
        self._info_keys = info_keys
        self._columns = observation_columns(first.observation_space)
        self._info_columns = info_columns(layout.info)
        self._write_actions = row_action_writer(first.action_space)
        random = RandomActions(action_columns(first.action_space), [env.action_space for env in envs])
        super().__init__(envs, [1] * len(envs), layout, watch, random)
        for member, env in enumerate(envs):
            self._check_layout(env, f"environment {member} of the group")
        self._step_functions: list[Any] = [env.step for env in envs]
        self._turn = 0
        # A memoryview is written in two thirds of the time that an array takes.
        self._since: Any = watch.since.data
        self._member: Any = watch.member.data
        # Of the step under way.
        self._rows: NDArray[np.int64] = np.empty(0, np.int64)
        self._left: Iterator[tuple[int, Callable[[Any], Any], Any]] = iter(())
        self._timed_row = 0
        self._returned: list[Any] = []
        self._rewards: list[Any] = []
        self._infos: list[Any] = []
        self._ended: list[tuple[int, bool]] = []
        # Rows to reset, with their seeds.
        self._resets: Iterator[tuple[int, int | None]] = iter(())

    def reset(self, seeds: Sequence[int]) -> None:
        self._begin()
        for row, seed in enumerate(seeds):
            self._random.seed(row, int(seed))
        self._ready_changed = True
        self._reset_all([(row, int(seed)) for row, seed in enumerate(seeds) if self._envs[row] is not None])

    def step(self, rows: NDArray[np.int64], actions: Sequence[NDArray[Any]]) -> None:
        self._begin()
        numbers = rows.tolist()
        functions: Iterable[Any] = self._step_functions
        if len(numbers) != self.size:
            functions = map(self._step_functions.__getitem__, numbers)
        self._turn += 1
        self._timed_row = numbers[self._turn % len(numbers)]
        self._rows = rows
        self._left = zip(numbers, functions, self._write_actions(actions), strict=True)
        self._returned, self._rewards, self._infos, self._ended = [], [], [], []
        self._go_on = self._step_rest
        self._step_rest()

    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None:
        self._begin()
        self._envs[member] = env
        try:
            self._check_layout(env, "the new environment")
            self._step_functions[member] = env.step
            self._random.seed(member, int(seeds[0]), env.action_space)
        except Exception as error:  # code of the user's may raise anything
            self._fail(member, error)
            self._finish()
            return
        self._ready_changed = True
        self._reset_all([(member, int(seeds[0]))])

    def _fail(self, member: int, error: BaseException) -> None:
        super()._fail(member, error)
        self._step_functions[member] = None  # for the environment to be freed

    def _check_layout(self, env: Any, name: str) -> None:
        layout = env_layout(env.observation_space, env.action_space, self._info_keys)
        if layout != self.layout:
            raise ValueError(f"{name} has the layout {layout}, the others of its group have {self.layout}")

    def _step_rest(self) -> None:
        # Announces its calls as _call does, inline: this loop is what a collector's speed depends on.
        self._watch.begin(0, Phase.STEP)
        calls, since, member, timed_row = self._calls, self._since, self._member, self._timed_row
        add_observation, add_reward = self._returned.append, self._rewards.append
        add_info = self._infos.append if self._info_columns else None
        for row, step, action in self._left:
            now = monotonic()
            since[0] = now
            member[0] = row
            calls[now] = row
            try:
                observation, reward, terminated, truncated, info = step(action)
                goes_on = not (terminated or truncated)
                del calls[now]
            except BaseException as error:  # code of the user's may raise anything
                if calls.pop(now, None) is None:
                    raise Abandoned from None
                self._fail(row, error)
                continue
            if row == timed_row:
                self.sample = row, monotonic() - now
            add_observation(observation)
            add_reward(reward)
            if add_info is not None:
                add_info(info)
            if not goes_on:
                self._ended.append((row, bool(terminated)))
        self._store()
        self._reset_all([(row, None) for row, _ in self._ended])

    def _store(self) -> None:
        """Write what the environments have returned into the arrays."""
        rows = self._rows
        if self.failures:
            failed = {row for row, _ in self.failures}
            rows = np.array([row for row in rows.tolist() if row not in failed], np.int64)
        every = None if len(rows) == self.size else rows
        if not (len(rows) == 0 or self._store_together(every)):
            rows = self._store_one_by_one(rows)
            every = rows
        self._returned.clear()  # for the next step to find this memory free, and in the cache
        self._infos.clear()
        self.stepped = rows
        where: Any = ... if every is None else every
        for next_observations, observations in zip(self.next_observations, self.observations, strict=True):
            observations[where] = next_observations[where]
        self.terminated[where] = False
        self.truncated[where] = False
        self.is_init[where] = False
        for row, terminated in self._ended:
            self.terminated[row] = terminated
            self.truncated[row] = not terminated

    def _store_together(self, rows: NDArray[np.int64] | None) -> bool:
        for column, out in zip(self._columns, self.next_observations, strict=True):
            if not column.gather(self._returned, out, rows):
                return False
        for column, out in zip(self._info_columns, self.info, strict=True):
            if not column.gather(self._infos, out, rows):
                return False
        return _REWARD.gather(self._rewards, self.reward, rows)

    def _store_one_by_one(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Do so for each row by itself, so that what can't be stored is a failure of its own environment."""
        stored = []
        infos = self._infos or [None] * len(self._returned)
        for row, observation, reward, info in zip(rows.tolist(), self._returned, self._rewards, infos, strict=True):
            try:
                for column, out in zip(self._columns, self.next_observations, strict=True):
                    column.put(observation, out, row)
                for column, out in zip(self._info_columns, self.info, strict=True):
                    column.put(info, out, row)
                _REWARD.put(reward, self.reward, row)
            except Exception as error:  # values of the user's may raise anything
                self._fail(row, error)
            else:
                stored.append(row)
        self._ended = [(row, terminated) for row, terminated in self._ended if row in stored]
        return np.array(stored, np.int64)

    def _reset_all(self, rows: Sequence[tuple[int, int | None]]) -> None:
        self._resets = iter(rows)
        self._go_on = self._reset_rest
        self._reset_rest()

    def _reset_rest(self) -> None:
        for row, seed in self._resets:
            reset = self._envs[row].reset
            result = (
                self._call(row, Phase.RESET, reset) if seed is None else self._call(row, Phase.RESET, reset, seed=seed)
            )
            if result is FAILED:
                continue
            try:
                observation, _ = result
                for column, out in zip(self._columns, self.observations, strict=True):
                    column.put(observation, out, row)
            except Exception as error:  # values of the user's may raise anything
                self._fail(row, error)
            else:
                self.is_init[row] = True
        self._finish()


_REWARD = Column(ArraySpec(("next", "reward"), (), np.dtype(np.float32)))
