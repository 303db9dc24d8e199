"""Environments of torchrl, of one row or of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aioinfer.collectors.environments.base import FAILED, Stepper
from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.environments.torchrl_specs import SpecSampler, action_leaves, sample_columns, torchrl_layout
from aioinfer.collectors.spaces import Column, InfoKeys, info_columns
from aioinfer.collectors.watch import Phase, Watch

__all__ = ["TorchRLStepper"]


class TorchRLStepper(Stepper):
    """Steps environments of torchrl's ``EnvBase`` interface, by ``step_and_maybe_reset``.

    The rows of an environment with a batch size step together, as soon as all of them have an action. An environment
    resets what has ended within its step: if that fails or hangs, the step is not complete.

    Args:
        envs: of equal layouts and batch sizes.
        watch: where calls are announced.
        info_keys: entries to store that steps return beside the observations.

    Raises:
        TypeError: an entry has no fixed layout.
        ValueError: the layouts are not equal, or an entry has a name that is taken.
    """

    def __init__(self, envs: Sequence[Any], watch: Watch, info_keys: InfoKeys = ()) -> None:
        first = envs[0]
        self._info_keys = info_keys
        self._batch_size = first.batch_size
        layout = torchrl_layout(first, info_keys)
        rows = self.min_rows = int(first.batch_size.numel())
        leaves = action_leaves(first)
        samplers = [SpecSampler(action_leaves(env), rows, row) for env in envs for row in range(rows)]
        random = RandomActions(sample_columns(leaves), samplers)
        super().__init__(envs, [rows] * len(envs), layout, watch, random)
        for member, env in enumerate(envs):
            self._check_layout(env, f"environment {member} of the group")
        self._columns = [Column(spec) for spec in layout.observation]
        self._info_columns = info_columns(layout.info)
        self._actions = [Column(spec).empty(self.size) for spec in layout.action]
        self._has_action = np.zeros(self.size, np.bool_)
        self._roots: list[Any] = [None] * self.members  # the TensorDict that each of them is asked to step from
        self._turn = 0
        self._resets: Iterator[tuple[int, int]] = iter(())
        self._steps: Iterator[int] = iter(())
        self._stepped: list[int] = []

    def reset(self, seeds: Sequence[int]) -> None:
        self._begin()
        for row, seed in enumerate(seeds):
            self._random.seed(row, int(seed))
        self._reset_all([(member, int(seeds[self._first_row[member]])) for member in range(self.members)])

    def step(self, rows: NDArray[np.int64], actions: Sequence[NDArray[Any]]) -> None:
        self._begin()
        self._ready_changed = True
        self._has_action[rows] = True
        for leaf, action in zip(self._actions, actions, strict=True):
            leaf[rows] = action
        asked = dict.fromkeys(self.member_of_row[rows].tolist())
        self._steps = iter([member for member in asked if self._has_action[self._slice(member)].all()])
        self._stepped = []
        self._go_on = self._step_rest
        self._step_rest()

    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None:
        self._begin()
        self._envs[member] = env
        try:
            self._check_layout(env, "the new environment")
            leaves, rows = action_leaves(env), self._rows_of(member)
            for index, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
                self._random.seed(row, int(seed), SpecSampler(leaves, len(rows), index))
        except Exception as error:  # code of the user's may raise anything
            self._fail(member, error)
            self._finish()
            return
        self._reset_all([(member, int(seeds[0]))])

    def _waiting_rows(self) -> NDArray[np.int64]:
        alive = super()._waiting_rows()
        return alive[~self._has_action[alive]]

    def _slice(self, member: int) -> slice:
        rows = self._rows_of(member)
        return slice(rows.start, rows.stop)

    def _check_layout(self, env: Any, name: str) -> None:
        layout = torchrl_layout(env, self._info_keys)
        if (layout, env.batch_size) != (self.layout, self._batch_size):
            raise ValueError(
                f"{name} has batch size {list(env.batch_size)} and layout {layout}, expected {list(self._batch_size)} "
                f"and {self.layout}"
            )

    def _reset_all(self, members: Sequence[tuple[int, int]]) -> None:
        self._ready_changed = True
        self._resets = iter(members)
        self._go_on = self._reset_rest
        self._reset_rest()

    def _reset_rest(self) -> None:
        for member, seed in self._resets:
            env, rows = self._envs[member], self._slice(member)
            if env is None:
                continue
            root = self._call(member, Phase.RESET, _seed_and_reset, env, seed)
            if root is FAILED:
                continue
            try:
                arrays = [self._read(root, column) for column in self._columns]
            except Exception as error:  # values of the user's may raise anything
                self._fail(member, error)
                continue
            for array, out in zip(arrays, self.observations, strict=True):
                out[rows] = array
            self.is_init[rows] = True
            self._has_action[rows] = False
            self._roots[member] = root
        self._finish()

    def _step_rest(self) -> None:
        self._turn += 1
        for member in self._steps:
            env, root, rows = self._envs[member], self._roots[member], self._slice(member)
            for spec, leaf in zip(self.layout.action, self._actions, strict=True):
                action = torch.from_numpy(leaf[rows].reshape((*self._batch_size, *spec.shape)).copy())
                root.set(spec.path, action.to(env.device))
            began = monotonic()
            result = self._call(member, Phase.STEP, env.step_and_maybe_reset, root)
            if result is FAILED:
                continue
            if member == self._turn % self.members:
                self.sample = rows.start, monotonic() - began
            try:
                self._store(rows, *result)
            except Exception as error:  # values of the user's may raise anything
                self._fail(member, error)
                continue
            self._roots[member] = result[1]
            self._has_action[rows] = False
            self._stepped.extend(self._rows_of(member))
        self.stepped = np.array(self._stepped, np.int64)
        self._finish()

    def _store(self, rows: slice, transition: Any, root: Any) -> None:
        following = transition.get("next")
        returned = [self._read(following, column) for column in self._columns]
        arrays = [self._read(root, column) for column in self._columns]
        reward = self._rows_of_entry(following, ("reward",)).reshape(-1)
        done = self._flag(following, "done")
        truncated = self._flag(following, "truncated")
        # An environment without these flags of its own has terminated where it is done.
        terminated = self._flag(following, "terminated") | (done & ~truncated)
        for column, out in zip(self._info_columns, self.info, strict=True):
            self._store_info(following, column, out, rows)
        for array, out in zip(returned, self.next_observations, strict=True):
            out[rows] = array
        for array, out in zip(arrays, self.observations, strict=True):
            out[rows] = array
        self.reward[rows] = reward
        self.terminated[rows] = terminated
        self.truncated[rows] = truncated & ~terminated
        self.is_init[rows] = done | terminated | truncated

    def _store_info(self, following: Any, column: Column, out: NDArray[Any], rows: slice) -> None:
        key = column.spec.path[-1]
        values = self._rows_of_entry(following, (key,)) if key in following.keys() else None  # noqa: SIM118
        for index, row in enumerate(range(rows.start, rows.stop)):
            column.put({} if values is None else {key: values[index].reshape(column.spec.shape)}, out, row)

    def _read(self, td: Any, column: Column) -> NDArray[Any]:
        return column.read(self._rows_of_entry(td, column.spec.path), self.min_rows)

    def _flag(self, td: Any, key: str) -> NDArray[np.bool_]:
        if key not in td.keys():  # noqa: SIM118
            return np.zeros(self.min_rows, np.bool_)
        return self._rows_of_entry(td, (key,)).reshape(-1)

    def _rows_of_entry(self, td: Any, path: tuple[str, ...]) -> NDArray[Any]:
        value = td.get(path, None)
        if value is None:
            raise ValueError(f"{path} is missing")
        shape = value.shape[len(self._batch_size) :]
        array: NDArray[Any] = value.detach().cpu().numpy().reshape(self.min_rows, *shape)
        return array


def _seed_and_reset(env: Any, seed: int) -> Any:
    env.set_seed(seed)
    return env.reset()
