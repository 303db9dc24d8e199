"""Writes the steps of one environment, element by element: to index with an array takes several times as long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

from aioinfer.collectors.fragments import FragmentRing
from aioinfer.collectors.policy_layout import PolicyLayout
from aioinfer.collectors.spaces import EnvLayout
from aioinfer.collectors.writer import FragmentWriter

__all__ = ["RowWriter"]

Array: TypeAlias = NDArray[Any]


class RowWriter(FragmentWriter):
    """A :class:`FragmentWriter` of one environment. Its values are one row of arrays ``[size, *shape]``.

    Args:
        ring: where to.
        env: the number of the environment.
        row: which row of the arrays is its.
        layout: of the environment.
        policy: what requests to the policy and replies have.
    """

    def __init__(self, ring: FragmentRing, env: int, row: int, layout: EnvLayout, policy: PolicyLayout) -> None:
        super().__init__(ring, [env], layout, policy)
        self._at = row
        # Memory that the other methods write too.
        self._one_cell: Any = self._cell.data
        self._one_step: Any = self._steps.data
        self._one_row: Any = self._row.data
        self._lengths: Any = ring.lengths.data
        # Of several elements, where those of the base class are of one item each.
        self._observations = [self._column(spec.path) for spec in layout.observation]
        self._states = [self._column(state.spec.path) for state in policy.states]
        self._info = [self._column(("next", *spec.path)) for spec in layout.info]
        self._next = [self._column(("next", *spec.path)) for spec in layout.observation] if self._keeps_next else []

    def begin_step(
        self, observations: Sequence[Array], states: Sequence[Array], is_init: bool, episode: int, step: int
    ) -> None:
        """Write what the policy is asked.

        Args:
            observations: ``[size, *shape]`` each.
            states: ``[size, *shape]`` each.
            is_init: whether it is the first observation of an episode.
            episode: which one.
            step: how many steps of it were made.
        """
        cell, at = self._one_cell[0], self._at
        if self._keeps_next:
            for column, values in zip(self._observations, observations, strict=True):
                column[cell] = values[at]
        elif is_init or not self._one_step[0]:  # otherwise the step before has written them
            place = cell + self._one_row[0]
            for column, values in zip(self._observations, observations, strict=True):
                column[place] = values[at]
        for column, values in zip(self._states, states, strict=True):
            column[cell] = values[at]
        self._is_init[cell] = is_init
        self._episode[cell] = episode
        self._step[cell] = step

    def write_actions(self, received: Sequence[Array], index: int, version: int, random: bool) -> None:
        """Write what the policy said, or an action that was chosen at random.

        Args:
            received: actions and outputs, ``[k, *shape]`` each; outputs that are left out are zeros.
            index: which of these rows.
            version: of the weights.
            random: whether the action was chosen at random.
        """
        cell = self._one_cell[0]
        for column, values in zip(self._received, received, strict=False):
            column[cell] = values[index]
        for column in self._received[len(received) :]:
            column[cell] = 0
        self._version[cell] = version
        self._random[cell] = random

    def end_step(
        self,
        observations: Sequence[Array],
        info: Sequence[Array],
        reward: float,
        terminated: bool,
        truncated: bool,
    ) -> list[tuple[int, int]]:
        """Write what the environment did; returns its fragment, if that is complete.

        Args:
            observations: what the step led to, ``[size, *shape]`` each.
            info: entries of the info that are kept, ``[1, *shape]`` each.
            reward: of the step.
            terminated: whether the episode ended.
            truncated: whether it was cut off.
        """
        cell, row, step, at = self._one_cell[0], self._one_row[0], self._one_step[0], self._at
        if self._keeps_next:
            for column, values in zip(self._next, observations, strict=True):
                column[cell] = values[at]
        elif not (terminated or truncated):
            place = cell + row + 1
            for column, values in zip(self._observations, observations, strict=True):
                column[place] = values[at]
        elif not self._ring.keep_final(row, step, [values[at] for values in observations]):
            self._is_full[0] = True
            self._until_end = 0
        for column, values in zip(self._info, info, strict=True):
            column[cell] = values[0]
        self._reward[cell] = reward
        self._terminated[cell] = terminated
        self._truncated[cell] = truncated
        self._one_cell[0] = cell + 1
        self._one_step[0] = step + 1
        self._lengths[row] = step + 1  # last: the step counts from now on
        self._until_end -= 1
        self._until_asking -= 1
        return [] if self._until_end > 0 else self._settle()
