"""The metrics of a run: samples of every counter, and the rates between two samples."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from aioinfer.demo.learning_curve import LearningCurve
from aioinfer.server import InferenceServer

# The view shows the latest second: long enough for readable numbers, short enough to see them change.
_RECENT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    frames: int
    passes: int
    batched: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """The state of the run.

    Attributes:
        elapsed: seconds since the run began.
        average_return: of the latest episodes; ``None`` before the first has ended.
        episodes: ended since the run began.
        rate: frames per second.
        batch_size: observations per forward pass; 0 without one.
        version: of the policy that computes the replies; 0 before the first weights.
        weights_age: seconds since the trainer published that version; ``None`` before the first weights.
    """

    elapsed: float
    average_return: float | None
    episodes: int
    rate: float
    batch_size: float
    version: int
    weights_age: float | None


class MetricsReader:
    """Reads the counters of the run and of the server, without stopping any of them. Event loop only.

    Args:
        curve: counts frames and episodes.
        server: counts requests and batches.
    """

    def __init__(self, curve: LearningCurve, *, server: InferenceServer) -> None:
        self._curve = curve
        self._server = server
        self._published: dict[int, float] = {}
        self._first = self._sample()
        self._recent = deque([self._first])

    def publish(self, version: int, at: float) -> None:
        """Record that the trainer published a version, and when, by ``time.monotonic``."""
        self._published[version] = at

    def recent(self) -> Metrics:
        """The metrics of the latest second."""
        now = self._sample()
        self._recent.append(now)
        while len(self._recent) > 2 and now.at - self._recent[1].at >= _RECENT_SECONDS:
            self._recent.popleft()
        return self._between(self._recent[0], now)

    def whole(self) -> Metrics:
        """The metrics since the run began."""
        return self._between(self._first, self._sample())

    def _sample(self) -> _Sample:
        stats = self._server.stats()
        passes = sum(stats.batches.values())
        batched = stats.mean_batch_size * passes
        return _Sample(at=time.monotonic(), frames=self._curve.frames, passes=passes, batched=batched)

    def _between(self, old: _Sample, new: _Sample) -> Metrics:
        seconds, passes, version = new.at - old.at, new.passes - old.passes, self._server.policy_version
        # Weights may arrive before the trainer's notice of them: then they are new.
        age = new.at - self._published.get(version, new.at) if self._published else None
        return Metrics(
            elapsed=new.at - self._curve.started,
            average_return=self._curve.average,
            episodes=len(self._curve.episodes),
            rate=(new.frames - old.frames) / seconds,
            batch_size=(new.batched - old.batched) / passes if passes else 0.0,
            version=version,
            weights_age=age,
        )
