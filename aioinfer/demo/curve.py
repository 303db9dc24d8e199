"""How far it has learned: each return and each policy version of the run, and when."""

from __future__ import annotations

import asyncio
import time
from collections import deque

__all__ = ["GOAL", "WINDOW", "LearningCurve"]

GOAL = 450.0
"""The average return that counts as learned; an episode of CartPole-v1 returns 500 at most."""

WINDOW = 50
"""How many of the latest episodes the average is over."""


class LearningCurve:
    """Records the run from now on. Event loop only.

    Attributes:
        episodes: for each: seconds since the start, its return, and the average that it led to.
        versions: seconds since the start, and the policy version that computed the replies from then on.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.episodes: list[tuple[float, float, float]] = []
        self.versions: list[tuple[float, int]] = []
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._goal = asyncio.Event()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def average(self) -> float | None:
        """Average return of the latest episodes; ``None`` before the first has ended."""
        return self.episodes[-1][2] if self.episodes else None

    @property
    def learned(self) -> bool:
        """Whether the goal has been reached."""
        return self._goal.is_set()

    async def wait_for_goal(self) -> None:
        """Wait until the goal is reached."""
        await self._goal.wait()

    def add_episode(self, episode_return: float) -> None:
        """Record an episode that has ended."""
        self._latest.append(episode_return)
        average = sum(self._latest) / len(self._latest)
        self.episodes.append((self.elapsed, episode_return, average))
        if len(self._latest) == WINDOW and average >= GOAL:
            self._goal.set()

    def see_version(self, version: int) -> None:
        """Record that a reply came from this version."""
        if not self.versions or version > self.versions[-1][1]:
            self.versions.append((self.elapsed, version))
