"""What the demo measures: samples of every counter, and the figures between two samples."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aioinfer.demo.players import Player
from aioinfer.stats import Percentiles, ServerStats

__all__ = ["Figures", "Scoreboard"]

# The view shows the latest seconds: as many as make the figures readable, few enough to see them change.
_RECENT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    task_frames: int
    thread_frames: int
    episodes: int
    returns: float
    passes: int
    batched: float
    stats: ServerStats


@dataclass(frozen=True, slots=True)
class Figures:
    """What happened in a stretch of the run.

    Attributes:
        elapsed: seconds since the run began.
        task_rate: frames per second in coroutines.
        thread_rate: frames per second in threads.
        batch_size: requests per forward pass; 0 without one.
        queue_wait: of the server's latest requests, in seconds.
        forward: of the server's latest forward passes, in seconds.
        episodes: finished since the run began.
        mean_return: of the episodes that finished in this stretch; ``None`` if none did.
        outcomes: requests since the run began, by what became of them.
    """

    elapsed: float
    task_rate: float
    thread_rate: float
    batch_size: float
    queue_wait: Percentiles
    forward: Percentiles
    episodes: int
    mean_return: float | None
    outcomes: dict[str, int]

    @property
    def rate(self) -> float:
        """Frames per second in all."""
        return self.task_rate + self.thread_rate


class Scoreboard:
    """Reads the counters of the players and of the server, without stopping any of them.

    Args:
        tasks: players in coroutines.
        threads: players in threads.
        stats: the server's ``stats``.
    """

    def __init__(self, tasks: Sequence[Player], threads: Sequence[Player], *, stats: Callable[[], ServerStats]) -> None:
        self._tasks = tasks
        self._threads = threads
        self._stats = stats
        self._first = self._sample()
        self._recent = deque([self._first])

    def recent(self) -> Figures:
        """The figures of the latest two seconds."""
        now = self._sample()
        self._recent.append(now)
        while len(self._recent) > 2 and now.at - self._recent[1].at >= _RECENT_SECONDS:
            self._recent.popleft()
        return self._between(self._recent[0], now)

    def whole(self) -> Figures:
        """The figures since the run began."""
        return self._between(self._first, self._sample())

    def _sample(self) -> _Sample:
        players, stats = (*self._tasks, *self._threads), self._stats()
        passes = sum(stats.batches.values())
        return _Sample(
            at=time.perf_counter(),
            task_frames=sum([player.frames for player in self._tasks]),
            thread_frames=sum([player.frames for player in self._threads]),
            episodes=sum([player.episodes for player in players]),
            returns=sum([player.returns for player in players]),
            passes=passes,
            batched=stats.mean_batch_size * passes,
            stats=stats,
        )

    def _between(self, old: _Sample, new: _Sample) -> Figures:
        seconds, passes, episodes = new.at - old.at, new.passes - old.passes, new.episodes - old.episodes
        stats = new.stats
        return Figures(
            elapsed=new.at - self._first.at,
            task_rate=(new.task_frames - old.task_frames) / seconds,
            thread_rate=(new.thread_frames - old.thread_frames) / seconds,
            batch_size=(new.batched - old.batched) / passes if passes else 0.0,
            queue_wait=stats.queue_wait,
            forward=stats.forward,
            episodes=new.episodes,
            mean_return=(new.returns - old.returns) / episodes if episodes else None,
            outcomes={
                "ok": stats.ok,
                "failed": stats.failed,
                "cancelled": stats.cancelled,
                "rejected": stats.rejected,
            },
        )
