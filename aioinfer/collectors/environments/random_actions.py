"""Random actions for each row of a group, from a sequence that belongs to the row's seed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.spaces import Column

__all__ = ["RandomActions"]


class RandomActions:
    """Draws actions from spaces.

    Args:
        columns: the leaves of an action.
        spaces: the action space of each row, with ``seed`` and ``sample``; copied before they are used.
    """

    def __init__(self, columns: Sequence[Column], spaces: Sequence[Any]) -> None:
        self._columns = columns
        self._spaces = list(spaces)
        self._seeds = [0] * len(spaces)
        self._copies: dict[int, Any] = {}

    def seed(self, row: int, seed: int, space: Any = None) -> None:
        """Begin a row's sequence anew, from another space where one is given."""
        if space is not None:
            self._spaces[row] = space
        self._seeds[row] = seed
        self._copies.pop(row, None)

    def draw(self, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Draw the next action of each row, ``[len(rows), *shape]`` for each leaf."""
        drawn = [self._copy(row).sample() for row in rows.tolist()]
        leaves = [column.empty(len(drawn)) for column in self._columns]
        for column, leaf in zip(self._columns, leaves, strict=True):
            if not column.gather(drawn, leaf, None):
                for index, action in enumerate(drawn):
                    column.put(action, leaf, index)
        return leaves

    def _copy(self, row: int) -> Any:
        space = self._copies.get(row)
        if space is None:
            space = self._copies[row] = deepcopy(self._spaces[row])
            # A stream of its own: the environment itself draws from that of the seed.
            (stream,) = np.random.SeedSequence(self._seeds[row]).spawn(1)
            space.seed(int(stream.generate_state(1)[0]))
        return space
