"""An EnvPool whose batch size is below the number of its environments: rows come back as they are done."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.environments.base import FAILED, NO_ROWS, Stepper
from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.spaces import (
    InfoKeys,
    action_columns,
    as_items,
    batched_action_writer,
    env_layout,
    info_columns,
    observation_columns,
)
from aioinfer.collectors.watch import Phase, Watch

__all__ = ["EnvPoolStepper"]


class EnvPoolStepper(Stepper):
    """Steps an EnvPool of Gymnasium's interface by ``send`` and ``recv``.

    :meth:`step` sends actions, and waits for one batch of results, of whichever rows have them first. Others come back
    from a later call. So :meth:`reset` makes the first rows ``ready``, not all. Nothing is waited for while fewer rows
    than a batch are under way.

    The seeds of an EnvPool are those that it was made with; :meth:`reset` can't change them.

    Args:
        env: with ``send``, ``recv`` and ``async_reset``.
        watch: where calls are announced.
        info_keys: entries of infos to store.

    Raises:
        TypeError: a space has no fixed layout.
        ValueError: its environments have several players.
    """

    is_uneven = True

    def __init__(self, env: Any, watch: Watch, info_keys: InfoKeys = ()) -> None:
        rows = int(env.num_envs)
        observation_space, action_space = env.single_observation_space, env.single_action_space
        layout = env_layout(observation_space, action_space, info_keys)
        columns = action_columns(action_space)
        super().__init__([env], [rows], layout, watch, RandomActions(columns, [action_space] * rows))
        self.min_rows = _batch_size(env)
        self._info_keys = info_keys
        self._columns = observation_columns(observation_space)
        self._info_columns = info_columns(layout.info)
        self._write_actions = batched_action_writer(action_space)
        self._outs = [as_items(array) for array in self.observations]
        self._next_outs = [as_items(array) for array in self.next_observations]
        self._no_actions = [column.empty(rows) for column in columns]  # for rows that are to be reset
        self._waits = np.zeros(rows, np.bool_)  # for an action
        self._resetting = np.zeros(rows, np.bool_)  # what comes back next is a first observation
        self._has_stepped = np.zeros(rows, np.bool_)  # in this call
        self._ended = NO_ROWS  # to be sent
        self._sent_at = np.zeros(rows)
        self._turn = 0

    def reset(self, seeds: Sequence[int]) -> None:
        self._begin()
        for row, seed in enumerate(seeds):
            self._random.seed(row, int(seed))
        self._reset()

    def step(self, rows: NDArray[np.int64], actions: Sequence[NDArray[Any]]) -> None:
        self._begin()
        self._go_on = self._finish
        self._ready_changed = True
        self._has_stepped[:] = False
        if self._send(rows, actions):
            self._receive(Phase.STEP)
        self._finish()

    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None:
        self._begin()
        self._envs[member] = env
        try:
            layout = env_layout(env.single_observation_space, env.single_action_space, self._info_keys)
            if (layout, int(env.num_envs), _batch_size(env)) != (self.layout, self.size, self.min_rows):
                raise ValueError(
                    f"the new environment has {env.num_envs} rows, batch size {_batch_size(env)} and layout {layout}, "
                    f"the one before had {self.size}, {self.min_rows} and {self.layout}"
                )
            for row, seed in enumerate(seeds):
                self._random.seed(row, int(seed), env.single_action_space)
        except Exception as error:  # code of the user's may raise anything
            self._fail(member, error)
            self._finish()
            return
        self._reset()

    def _waiting_rows(self) -> NDArray[np.int64]:
        return NO_ROWS if self._envs[0] is None else self._waits.nonzero()[0]

    def _reset(self) -> None:
        self._go_on = self._finish
        self._ready_changed = True
        self._waits[:] = False
        self._resetting[:] = True
        self._ended = NO_ROWS
        self._sent_at[:] = monotonic()
        if self._call(0, Phase.RESET, self._envs[0].async_reset) is not FAILED:
            self._receive(Phase.RESET)
        self._finish()

    def _send(self, rows: NDArray[np.int64], actions: Sequence[NDArray[Any]]) -> bool:
        """Send the actions of these rows, and any for rows that have ended, which are reset whatever they are."""
        if count := len(self._ended):
            rows, self._ended = np.concatenate([rows, self._ended]), NO_ROWS
            actions = [
                np.concatenate([action, any_action[:count]])
                for action, any_action in zip(actions, self._no_actions, strict=True)
            ]
        self._waits[rows] = False
        self._sent_at[rows] = monotonic()
        written = self._write_actions(actions)
        sent = self._call(0, Phase.STEP, self._envs[0].send, written, env_id=rows.astype(np.int32))
        return sent is not FAILED

    def _receive(self, phase: Phase) -> None:
        """Receive until a row waits for an action, or too few are under way for a batch."""
        while self.size - len(self._ended) - np.count_nonzero(self._waits) >= self.min_rows:
            result = self._call(0, phase, self._envs[0].recv)
            if result is FAILED:
                return
            try:
                self._store(*result)
            except Exception as error:  # values of the user's may raise anything
                self._fail(0, error)
                return
            if np.count_nonzero(self._waits) or not self._send(NO_ROWS, [leaf[:0] for leaf in self._no_actions]):
                return

    def _store(self, observations: Any, rewards: Any, terminated: Any, truncated: Any, infos: Any) -> None:
        """Write a batch of results into the arrays."""
        rows = np.asarray(infos["env_id"], np.int64)
        arrays = [
            as_items(np.ascontiguousarray(column.read(observations, len(rows)), column.spec.dtype))
            for column in self._columns
        ]
        terminated = np.asarray(terminated, np.bool_)
        truncated = np.asarray(truncated, np.bool_) & ~terminated
        starts = self._resetting[rows]
        stepped = ~starts
        ended = (terminated | truncated) & stepped
        for array, out in zip(arrays, self._outs, strict=True):
            out[rows] = array
        self.is_init[rows] = starts
        self._resetting[rows] = ended
        self._waits[rows] = ~ended
        ended_rows = rows[ended]
        self._ended = np.concatenate([self._ended, ended_rows]) if len(self._ended) else ended_rows
        done = rows[stepped]
        if not len(done):
            return
        # A row may end in one batch of a call, and start in the next. Of others all may be written, which is faster.
        chosen: Any = stepped if len(self.stepped) else ...
        written = rows[chosen]
        for array, out in zip(arrays, self._next_outs, strict=True):
            out[written] = array[chosen]
        self.reward[written] = np.asarray(rewards)[chosen]
        self.terminated[written] = terminated[chosen]
        self.truncated[written] = truncated[chosen]
        for column, out in zip(self._info_columns, self.info, strict=True):
            if column.spec.path[-1] in infos:
                out[written] = column.read(infos, len(rows))[chosen]
            else:
                for row in written.tolist():
                    column.put({}, out, row)
        self._turn += 1
        row = int(done[self._turn % len(done)])
        self.sample = row, monotonic() - float(self._sent_at[row])
        self._has_stepped[done] = True
        self.stepped = self._has_stepped.nonzero()[0]


def _batch_size(env: Any) -> int:
    config = env.config
    if config.get("max_num_players", 1) > 1:
        raise ValueError(f"the environments of {env} have {config['max_num_players']} players, expected one")
    return int(config["batch_size"])
