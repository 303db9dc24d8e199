"""Writes the steps of a group's environments into the rows of the ring that they were granted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.fragments import FragmentRing
from aioinfer.collectors.policy_layout import PolicyLayout
from aioinfer.collectors.spaces import EnvLayout, as_items

__all__ = ["FragmentWriter"]

Array: TypeAlias = NDArray[Any]
Path: TypeAlias = tuple[str, ...]

# A row for the next fragment is asked for so many steps before the end of this one, or a quarter of it before. Those
# that have less than twice as many left then ask too, so that not each step asks where environments are at odds.
_EARLY_STEPS = 8


class FragmentWriter:
    """Writes steps, each in two halves: what the policy was asked and said, and what the environment then did.

    A cell is a step of a row: its index in a column whose rows follow each other, ``[num_rows * T, *shape]``. The first
    half counts for nothing before the second is complete, and ``ring.lengths`` says so last: whoever looks at the
    ring after this process was killed finds whole steps only. One thread's, or one task's.

    Args:
        ring: where to.
        envs: the numbers of the group's environments.
        layout: of the environments.
        policy: what requests to the policy and replies have.

    Attributes:
        has_row: ``[size]``: whether the environment may step.
    """

    def __init__(self, ring: FragmentRing, envs: Sequence[int], layout: EnvLayout, policy: PolicyLayout) -> None:
        self._ring = ring
        self._length = ring.layout.length
        self._early = max(1, min(_EARLY_STEPS, self._length // 4))
        self._envs = np.array(envs, np.int64)
        size = len(envs)
        self.has_row = np.zeros(size, np.bool_)
        self._row = np.full(size, -1, np.int64)
        self._next_row = np.full(size, -1, np.int64)
        self._steps = np.zeros(size, np.int64)
        self._cell = np.zeros(size, np.int64)
        self._asked = np.zeros(size, np.bool_)
        self._is_full = np.zeros(size, np.bool_)  # the fragment has no place for another end of an episode
        self._until_end = self._length  # so many more steps no fragment ends
        self._until_asking = 0  # and none is so near to its end that its environment is to ask for the next row
        self._has_ended = False  # a fragment, since the group asked last
        column = self._column
        self._observations = [as_items(column(spec.path)) for spec in layout.observation]
        self._states = [as_items(column(state.spec.path)) for state in policy.states]
        self._keeps_next = not ring.layout.observations
        self._received = [column(spec.path) for spec in (*policy.action, *policy.outputs)]
        self._version, self._is_init = column(("policy_version",)), column(("is_init",))
        self._episode, self._step = column(("collector", "episode")), column(("collector", "step"))
        self._random = column(("collector", "random"))
        self._info = [as_items(column(("next", *spec.path))) for spec in layout.info]
        following = layout.observation if self._keeps_next else ()
        self._next = [as_items(column(("next", *spec.path))) for spec in following]
        self._reward = column(("next", "reward"))
        self._terminated, self._truncated = column(("next", "terminated")), column(("next", "truncated"))

    def _column(self, path: Path) -> Array:
        column = self._ring.columns[path]
        num_rows, length, *shape = column.shape
        if path in _ONE_ELEMENT:
            shape = []
        # Where rows have a step more than others, a cell's index is larger by the number of its row.
        cells = column.view()
        cells.shape = (num_rows * length, *shape)  # raises where that would copy
        return cells

    # -- rows ------------------------------------------------------------------------------------------

    def grant(self, index: int, row: int) -> None:
        """Let environment ``index`` of the group write to a row of the ring, now or after its fragment's end."""
        if self.has_row[index]:
            self._next_row[index] = row
        else:
            self._begin(index, row)

    def _begin(self, index: int | Array, row: int | Array) -> None:
        self._row[index] = row
        self._steps[index] = 0
        self._cell[index] = row * self._length
        self._asked[index] = self._is_full[index] = False
        self.has_row[index] = True

    def asking(self, present: Array) -> list[int]:
        """The environments that need a row soon, and have not asked; all of them are told once.

        Args:
            present: ``[size]``: whether the environment is there.
        """
        self._has_ended = False
        if self._until_asking > 0:
            return []
        soon = ~self._asked & (~self.has_row | (self._steps >= self._length - 2 * self._early))
        told = soon & present
        self._asked |= told
        most = self._length - self._early
        self._until_asking = int((most - self._steps[~self._asked]).min(initial=most))
        if np.count_nonzero(told) < np.count_nonzero(soon):  # some are to be told as soon as they are there
            self._until_asking = 0
        asking: list[int] = self._envs[told].tolist()
        return asking

    def cut(self, index: int) -> list[tuple[int, int]]:
        """End the fragment of an environment that is gone; returns the rows that it had, with its number.

        Its last complete step becomes the last of its episode: truncated, unless it was that anyway.
        """
        env, rows = int(self._envs[index]), []
        if self.has_row[index]:
            self._ring.truncate(int(self._row[index]))
            rows.append((env, int(self._row[index])))
        if self._next_row[index] >= 0:
            rows.append((env, int(self._next_row[index])))
        self._end(index)
        self._row[index] = self._next_row[index] = -1
        self._asked[index] = False
        self._until_asking = 0
        return rows

    def _end(self, index: int | Array) -> None:
        self._steps[index] = 0
        self.has_row[index] = self._is_full[index] = False

    # -- steps -----------------------------------------------------------------------------------------

    def write_request(
        self,
        rows: Array | None,
        observations: Sequence[Array],
        states: Sequence[Array],
        is_init: Array,
        episodes: Array,
        steps: Array,
    ) -> None:
        """Write what the policy is asked.

        Args:
            rows: the environments of the group that are to step; ``None``: all of them.
            observations: ``[size, *shape]`` each.
            states: ``[size, *shape]`` each.
            is_init: ``[size]``.
            episodes: ``[size]``: which episode each is in.
            steps: ``[size]``: how many steps of it were made.
        """
        chosen: Any = slice(None) if rows is None else rows
        cells = self._cell[chosen]
        if self._keeps_next:
            for column, values in zip(self._observations, observations, strict=True):
                column[cells] = as_items(values)[chosen]
        else:
            self._write_first_observations(rows, observations, is_init)
        for column, values in zip(self._states, states, strict=True):
            column[cells] = as_items(values)[chosen]
        self._is_init[cells] = is_init[chosen]
        self._episode[cells] = episodes[chosen]
        self._step[cells] = steps[chosen]

    def _write_first_observations(self, rows: Array | None, observations: Sequence[Array], is_init: Array) -> None:
        """Write those that no step of the same fragment has led to: the others are there."""
        first = is_init | (self._steps == 0)
        indices = np.flatnonzero(first) if rows is None else rows[first[rows]]
        cells = self._cell[indices] + self._row[indices]
        for column, values in zip(self._observations, observations, strict=True):
            column[cells] = as_items(values)[indices]

    def write_reply(self, rows: Array | None, received: Sequence[Array], versions: Array | int, random: bool) -> None:
        """Write what the policy said, or an action that was chosen at random.

        Args:
            rows: as above.
            received: actions and outputs, ``[len(rows), *shape]`` each; outputs that are left out are zeros.
            versions: ``[len(rows)]``, of the weights.
            random: whether the actions were chosen at random.
        """
        cells = self._cell if rows is None else self._cell[rows]
        for column, values in zip(self._received, received, strict=False):
            column[cells] = values
        for column in self._received[len(received) :]:
            column[cells] = 0
        self._version[cells] = versions
        self._random[cells] = random

    def write_step(
        self,
        rows: Array | None,
        observations: Sequence[Array],
        info: Sequence[Array],
        reward: Array,
        terminated: Array,
        truncated: Array,
    ) -> list[tuple[int, int]]:
        """Write what the environments did, each array ``[size, *shape]``; returns the fragments that are complete.

        Args:
            rows: the environments of the group that have made a step; ``None``: all of them.
            observations: what the step led to.
            info: entries of the infos that are kept.
            reward: of the step.
            terminated: whether the episode ended.
            truncated: whether it was cut off.
        """
        chosen: Any = slice(None) if rows is None else rows
        cells = self._cell[chosen]
        if self._keeps_next:
            for column, values in zip(self._next, observations, strict=True):
                column[cells] = as_items(values)[chosen]
        else:
            self._write_next_observations(rows, observations, terminated | truncated)
        for column, values in zip(self._info, info, strict=True):
            column[cells] = as_items(values)[chosen]
        self._reward[cells] = reward[chosen]
        self._terminated[cells] = terminated[chosen]
        self._truncated[cells] = truncated[chosen]
        self._cell[chosen] = cells + 1
        self._steps[chosen] = steps = self._steps[chosen] + 1
        self._ring.lengths[self._row[chosen]] = steps  # last: the steps count from now on
        self._until_end -= 1
        self._until_asking -= 1
        return [] if self._until_end > 0 else self._settle()

    def _write_next_observations(self, rows: Array | None, observations: Sequence[Array], ended: Array) -> None:
        """Write what a step led to behind the step, and beside the fragment where the episode ended."""
        indices = np.arange(len(ended)) if rows is None else rows
        going_on = indices[~ended[indices]]
        cells = self._cell[going_on] + self._row[going_on] + 1
        for column, values in zip(self._observations, observations, strict=True):
            column[cells] = as_items(values)[going_on]
        for index in indices[ended[indices]].tolist():
            final = [values[index] for values in observations]
            if not self._ring.keep_final(int(self._row[index]), int(self._steps[index]), final):
                self._is_full[index] = True
                self._until_end = 0

    @property
    def may_ask(self) -> bool:
        """Whether a fragment has ended, or :meth:`asking` may have something to say."""
        return self._has_ended or self._until_asking <= 0

    def _settle(self) -> list[tuple[int, int]]:
        ended = ((self._steps == self._length) | self._is_full).nonzero()[0]
        finished = list(zip(self._envs[ended].tolist(), self._row[ended].tolist(), strict=True))
        self._has_ended = self._has_ended or bool(finished)
        self._end(ended)
        following, self._next_row[ended] = self._next_row[ended], -1
        goes_on = following >= 0
        self._begin(ended[goes_on], following[goes_on])
        # Others have asked, and get a row when there is one, or ask now.
        if np.count_nonzero(goes_on | self._asked[ended]) < len(ended):
            self._until_asking = 0
        self._until_end = self._length - int(self._steps[self._steps.argmax()])
        return finished


_ONE_ELEMENT = {("is_init",), ("next", "reward"), ("next", "terminated"), ("next", "truncated")}
