"""The figures of a collector: the frozen snapshot that users get, and the recorder that counts."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np

from aioinfer.collectors.messages import Progress
from aioinfer.collectors.watch import Watch
from aioinfer.stats import Percentiles

__all__ = ["CollectorStats", "Limit", "StatsRecorder", "shares_of_time"]

Limit: TypeAlias = Literal["environments", "policy", "reader"]

_EPISODES = 100
"""Returns and lengths are of so many latest episodes."""
_STEPS = 256
"""Percentiles of an environment's steps are of so many latest samples."""
_RATE_SECONDS = 10.0
"""The rate is that of the latest seconds."""


@dataclass(frozen=True, slots=True)
class CollectorStats:
    """A snapshot of a collector's figures since it was started.

    Attributes:
        frames: steps in the batches that were delivered, without those behind a cut.
        batches: that were delivered.
        frames_per_second: of the latest 10 seconds.
        episodes: that have ended.
        episode_return: sum of the rewards of an episode, the mean of the latest 100; ``None`` before the first.
        episode_length: steps of an episode, the mean of the latest 100; ``None`` before the first.
        step_seconds: by environment, how long one of its steps takes, of samples.
        limited_by: who limits the rate: the environments, the policy, or the reader, for whom batches wait.
        shares: of each of the three, the part of the time in which it was what the others waited for.
        restarts: by environment, how often it was made again.
        retired: environments that are gone for good, and why.
        timeouts: calls of environments that took too long.
        abandoned_threads: threads of this process that were left behind in such calls.
        dropped_batches: that nobody read in time (``overflow="drop_oldest"``).
        dropped_fragments: that were older than ``max_policy_lag`` when they were to be delivered; or whole episodes.
        non_finite: steps of delivered batches with a reward or an observation that is not finite.
        policy_lag: by how many versions the oldest step of delivered fragments was behind at the delivery.
        policy_version: of the weights in use.
    """

    frames: int
    batches: int
    frames_per_second: float
    episodes: int
    episode_return: float | None
    episode_length: float | None
    step_seconds: Mapping[int, Percentiles]
    limited_by: Limit
    shares: Mapping[Limit, float]
    restarts: Mapping[int, int]
    retired: Mapping[int, BaseException]
    timeouts: int
    abandoned_threads: int
    dropped_batches: int
    dropped_fragments: int
    non_finite: int
    policy_lag: Percentiles
    policy_version: int


def shares_of_time(
    hosts: Sequence[Sequence[Watch]], *, started: float, now: float, reader_waited: float
) -> dict[Limit, float]:
    """For what part of the time environments stepped, the policy was waited for, and the reader; together 1.

    A host whose groups take turns is busy as long as one of them steps. What is left when none steps is the policy's,
    but for the time in which groups had no row of the ring to write to. That is the reader's while he does not wait
    for a batch himself; else it is other environments that are waited for.

    Args:
        hosts: the watches of the groups of each host.
        started: when they began to count.
        now: when they end to count.
        reader_waited: seconds for which the reader has waited for batches.
    """
    elapsed = max(now - started, 1e-9)
    reads = max(0.0, 1.0 - reader_waited / elapsed)
    shares: dict[Limit, float] = {"environments": 0.0, "policy": 0.0, "reader": 0.0}
    counted = [watches for watches in hosts if watches]
    for watches in counted:
        stepping, _, without_row = np.sum([watch.seconds_until(now) for watch in watches], axis=0) / elapsed
        waits = min(1.0, without_row / len(watches))
        reader = min(reads, waits)
        environments = min(1.0 - reader, stepping + waits - reader)
        for name, share in (
            ("environments", environments),
            ("reader", reader),
            ("policy", max(0.0, 1.0 - environments - reader)),
        ):
            shares[name] += float(share) / len(counted)  # type: ignore[index]
    return shares


class StatsRecorder:
    """Counts. Its caller holds a lock."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.batches = self.frames = self.episodes = self.timeouts = self.abandoned = self.non_finite = 0
        self._returns: deque[float] = deque(maxlen=_EPISODES)
        self._lengths: deque[int] = deque(maxlen=_EPISODES)
        self._steps: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_STEPS))
        self._restarts: Counter[int] = Counter()
        self._lags: deque[float] = deque(maxlen=1024)
        self._delivered: deque[tuple[float, int]] = deque([(self.started, 0)])
        self._stopped: float | None = None
        self._waited = 0.0
        self._waits_since: float | None = None

    def start(self) -> None:
        """Count time from now on."""
        self.started = time.monotonic()
        self._delivered = deque([(self.started, 0)])

    def stop(self) -> None:
        """Count time until now."""
        self.end_wait()
        self._stopped = self.now()

    def now(self) -> float:
        """When figures are of: now, or when it ended."""
        return time.monotonic() if self._stopped is None else self._stopped

    def begin_wait(self) -> None:
        """Note that the reader waits for a batch."""
        if self._waits_since is None:
            self._waits_since = time.monotonic()

    def end_wait(self) -> None:
        """Note that the reader has a batch, or waits no more."""
        self._waited, self._waits_since = self.waited(), None

    def waited(self) -> float:
        """Seconds for which the reader has waited."""
        return self._waited + (0.0 if self._waits_since is None else self.now() - self._waits_since)

    def add(self, progress: Progress) -> None:
        """Count what a group has done."""
        for _, episode_return, length in progress.episodes:
            self.episodes += 1
            self._returns.append(episode_return)
            self._lengths.append(length)
        for env, seconds in progress.step_seconds:
            self._steps[env].append(seconds)

    def deliver(self, frames: int, lags: Sequence[int]) -> None:
        """Count a batch."""
        now = time.monotonic()
        self.batches += 1
        self.frames += frames
        self._lags.extend(lags)
        self._delivered.append((now, self.frames))
        while len(self._delivered) > 2 and now - self._delivered[1][0] >= _RATE_SECONDS:
            self._delivered.popleft()

    def restart(self, envs: Sequence[int]) -> None:
        """Count environments that are made again."""
        self._restarts.update(envs)

    def longest_step(self) -> float:
        """Seconds of the longest step that was sampled lately."""
        return max((seconds for steps in list(self._steps.values()) for seconds in steps), default=0.0)

    def timeout(self) -> None:
        """Count a call that took too long."""
        self.timeouts += 1

    def abandon(self) -> None:
        """Count a thread that was left behind."""
        self.abandoned += 1

    def snapshot(
        self,
        *,
        shares: Mapping[Limit, float],
        retired: Mapping[int, BaseException],
        dropped_batches: int,
        dropped_fragments: int,
        policy_version: int,
    ) -> CollectorStats:
        """Freeze the figures, beside what others know."""
        (since, before), (until, after) = self._delivered[0], self._delivered[-1]
        until = max(until, self.now() - _RATE_SECONDS)  # where nothing was delivered for so long, the rate falls
        return CollectorStats(
            frames=self.frames,
            batches=self.batches,
            frames_per_second=(after - before) / (until - since) if until > since else 0.0,
            episodes=self.episodes,
            episode_return=float(np.mean(self._returns)) if self._returns else None,
            episode_length=float(np.mean(self._lengths)) if self._lengths else None,
            step_seconds=MappingProxyType({env: Percentiles.of(steps) for env, steps in sorted(self._steps.items())}),
            limited_by=max(shares, key=lambda name: shares[name]),
            shares=MappingProxyType(dict(shares)),
            restarts=MappingProxyType(dict(self._restarts)),
            retired=MappingProxyType(dict(retired)),
            timeouts=self.timeouts,
            abandoned_threads=self.abandoned,
            dropped_batches=dropped_batches,
            dropped_fragments=dropped_fragments,
            non_finite=self.non_finite,
            policy_lag=Percentiles.of(self._lags),
            policy_version=policy_version,
        )
