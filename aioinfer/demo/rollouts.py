"""What the environments hand to the trainer: the newest fragments of episodes, no more than it can use."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fragment", "Rollouts"]


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """Consecutive steps of one episode: all of it, or a part that the next fragment continues.

    Attributes:
        observations: ``[T + 1, 4]``: before each step, and after the last.
        actions: ``[T]``.
        log_probs: ``[T]``: of the actions, under the policy that chose them.
        rewards: ``[T]``.
        terminated: whether the last step ended the episode. Not so where the time limit cut it off: what would
            have followed is worth as much as in an episode that goes on.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: bool

    def __len__(self) -> int:
        return len(self.actions)


class Rollouts:
    """Fragments that the trainer has not seen. Event loop only.

    Nobody waits for the trainer. Where it is behind, the oldest fragments are dropped: older policies than
    the others' collected them.

    Args:
        steps: the least that a batch has; what the newest fragments don't need to make it up is dropped.
    """

    def __init__(self, steps: int = 2048) -> None:
        self._wanted = steps
        self._held = 0
        self._fragments: deque[Fragment] = deque()
        self._enough = asyncio.Event()

    def add(self, fragment: Fragment) -> None:
        """Add a fragment, and drop the oldest ones that a batch can do without."""
        self._fragments.append(fragment)
        self._held += len(fragment)
        while self._held - len(self._fragments[0]) >= self._wanted:
            self._held -= len(self._fragments.popleft())
        if self._held >= self._wanted:
            self._enough.set()

    async def take(self) -> list[Fragment]:
        """Wait until there is a batch, and take it; takes nothing if it is cancelled."""
        await self._enough.wait()
        batch = list(self._fragments)
        self._fragments.clear()
        self._held = 0
        self._enough.clear()
        return batch
