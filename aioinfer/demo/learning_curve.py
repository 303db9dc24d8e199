"""The learning curve: each return and each policy version of the run over time, and its picture."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path

from tensordict import TensorDictBase

GOAL = 450.0
"""The average return at which the policy has learned; an episode of CartPole-v1 returns 500 at most."""

WINDOW = 50
"""Number of the latest episodes that the average is over."""


class LearningCurve:
    """Records the run from now on. Event loop only.

    Attributes:
        frames: steps of all environments so far.
        episodes: for each: seconds since the start, its return, and the average from then on.
        goal: set when the goal is reached.
        versions: seconds since the start, and the policy version that chose actions from then on.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.frames = 0
        self.episodes: list[tuple[float, float, float]] = []
        self.versions: list[tuple[float, int]] = []
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self.goal = asyncio.Event()

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
        return self.goal.is_set()

    def add_batch(self, batch: TensorDictBase) -> None:
        """Record what a batch ``[B, T]`` of the collector says."""
        self.frames += int(batch["collector", "mask"].sum())
        ended = batch["next", "done"].squeeze(-1)
        for last_step in batch["collector", "step"][ended].tolist():
            self.add_episode(last_step + 1.0)  # CartPole gives a reward of 1 for each step
        self.see_version(int(batch["policy_version"].max()))

    def add_episode(self, episode_return: float) -> None:
        """Record an episode that has ended."""
        self._latest.append(episode_return)
        average = sum(self._latest) / len(self._latest)
        self.episodes.append((self.elapsed, episode_return, average))
        if len(self._latest) == WINDOW and average >= GOAL:
            self.goal.set()

    def see_version(self, version: int) -> None:
        """Record that this version has chosen actions."""
        if not self.versions or version > self.versions[-1][1]:
            self.versions.append((self.elapsed, version))


def save_plot(curve: LearningCurve, path: Path, *, title: str) -> None:
    """Draw returns and policy versions over time into a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window, and no state that outlives the picture

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    figure.suptitle(title)
    returns, versions = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])

    at, single, average = ([episode[column] for episode in curve.episodes] for column in range(3))
    returns.scatter(at, single, s=9, alpha=0.25, linewidths=0, color="tab:blue", label="an episode")
    returns.plot(at, average, color="tab:blue", lw=2, label=f"average over {WINDOW} episodes")
    returns.axhline(GOAL, color="tab:green", ls="--", lw=1.2, label=f"goal: {GOAL:g}")
    for first in [at for at, version in curve.versions if version > 0][:1]:
        returns.axvline(first, color="tab:orange", ls=":", lw=1.2, label="first weights from the trainer")
    returns.set_ylim(0, 520)
    returns.set_ylabel("return")
    returns.legend(loc="center left", frameon=False)

    # The last version is drawn up to the last episode.
    steps = [*curve.versions, *[(at[-1], version) for _, version in curve.versions[-1:] if at]]
    versions.step([step[0] for step in steps], [step[1] for step in steps], where="post", color="tab:orange", lw=2)
    versions.set_ylim(bottom=0)
    versions.set_xlim(left=0)
    versions.set_ylabel("policy version")
    versions.set_xlabel("seconds since the start")
    for axes in (returns, versions):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
