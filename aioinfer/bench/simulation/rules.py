"""Schedulers to compare with: fixed ones, and one that learns the cost of a pass as BentoML's dispatcher does."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from aioinfer.batching import DispatchReason, Hold, ScheduledRequest

__all__ = ["FixedScheduler", "LinearModelScheduler"]


class FixedScheduler:
    """Wait until ``size`` rows are pending, or until the oldest of them has waited for ``seconds``.

    With size 1 it leaves when the model is free. With a long time it waits for full batches. Otherwise it is a fixed
    timer, as Triton's ``preferred_batch_size`` and ``max_queue_delay_microseconds``.
    """

    def __init__(self, size: int, seconds: float) -> None:
        self.size = size
        self.seconds = seconds
        self.batch_size = sys.maxsize

    def decide(
        self,
        *,
        now: float,
        pending: int,
        oldest: float,
        free_since: float,
        callers: int | None = None,
        draining: bool = False,
    ) -> DispatchReason | Hold:
        if pending >= self.size or draining:
            return DispatchReason.FULL
        left = oldest + self.seconds - now
        return Hold(self.size - pending, left) if left > 1e-9 else DispatchReason.TIMEOUT

    def on_batch(self, requests: Sequence[ScheduledRequest]) -> None:
        """Learn nothing."""

    def on_pass(self, rows: int, seconds: float) -> None:
        """Learn nothing."""

    def on_replies(self, requests: Sequence[ScheduledRequest], submitted_at: Sequence[float], now: float) -> None:
        """Learn nothing."""


class LinearModelScheduler:
    """Decide as BentoML's dispatcher does, but at once where that one polls each millisecond.

    It fits ``a * n + b`` to the last 50 passes, keeps the average time that the oldest request of a batch waited, and
    lets a batch of ``n`` leave once ``n * (seconds since n changed + 1 ms + a)`` exceeds 0.95 of that average. Nothing
    is cancelled, and there are no training passes.
    """

    _PASSES = 50
    _TICK = 0.001
    _DECAY = 0.95

    def __init__(self, max_batch_size: int = 64) -> None:
        self.batch_size = max_batch_size
        self._passes: deque[tuple[int, float, float]] = deque(maxlen=self._PASSES)
        self._seen = 0  # rows at the last call,
        self._last = 0.0  # and when the last of them was seen
        self._per_row = 0.0
        self._wait = 0.0
        self._waited = 0.0

    def decide(
        self,
        *,
        now: float,
        pending: int,
        oldest: float,
        free_since: float,
        callers: int | None = None,
        draining: bool = False,
    ) -> DispatchReason | Hold:
        if pending != self._seen:
            self._seen, self._last = pending, now
        if pending < self.batch_size and not draining:
            left = self._wait * self._DECAY / pending - self._TICK - self._per_row - (now - self._last)
            if left > 1e-9:
                return Hold(1, left)
        self._waited = now - oldest
        self._seen = 0
        return DispatchReason.IDLE

    def on_batch(self, requests: Sequence[ScheduledRequest]) -> None:
        """Learn nothing."""

    def on_pass(self, rows: int, seconds: float) -> None:
        """Fit the cost and the wait."""
        self._passes.append((rows, seconds, self._waited))
        count = len(self._passes)
        mean = sum([n for n, _, _ in self._passes]) / count
        variance = sum([(n - mean) ** 2 for n, _, _ in self._passes])
        slope = sum([(n - mean) * t for n, t, _ in self._passes]) / variance if variance else 0.0
        self._per_row = max(slope, 0.000001)
        self._wait = sum([wait for _, _, wait in self._passes]) / count

    def on_replies(self, requests: Sequence[ScheduledRequest], submitted_at: Sequence[float], now: float) -> None:
        """Learn nothing."""
