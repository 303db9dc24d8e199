"""Statistics of a server: a frozen snapshot, and the recorder that fills it."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any

from aioinfer.batching import DispatchReason

__all__ = ["Percentiles", "ServerStats", "StatsRecorder"]

# Percentiles are over the latest requests; at 4 000 requests/s that is two seconds.
_WINDOW_REQUESTS = 8192


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of a duration in seconds, over the latest requests; 0 where there were none."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Percentiles of ``seconds``, in any order."""
        if len(seconds) < 2:
            return cls(*[value for value in seconds for _ in range(3)])
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        return cls(cuts[49], cuts[94], cuts[98])


@dataclass(frozen=True, slots=True)
class ServerStats:
    """A snapshot of a server's statistics since it was made, or since the last reset.

    Attributes:
        ok: requests answered with a reply.
        failed: requests answered with an error: the model's, or that the server closed.
        cancelled: requests whose caller cancelled them, or whose deadline passed, before the answer.
        rejected: requests refused at ``submit``: invalid, or the queue was full; or by a pause.
        pending: requests that wait for a batch now.
        batches: forward passes by the reason they left, those that failed included.
        failed_passes: forward passes that raised. Where the model raises on several requests, their halves run again: a
            model that can't batch takes ``2n - 1`` passes for ``n`` requests, of which ``n - 1`` fail.
        mean_batch_size: requests answered per forward pass; 0 without one.
        queue_wait: from ``submit`` until a batch took the request.
        forward: one forward pass: collate, copy to the device, model, copy back.
        request: from ``submit`` until the reply was handed over.
        policy_version: the version of the weights in use, whether or not the statistics were reset.
        weight_updates: updates of the weights that were applied.
        refused_updates: updates that did not fit, or had no weights.
        trainer_connected: whether a trainer has published weights for this server and is still there; ``None``
            before the server's first start, and where nothing is received (without ``weight_sync``, or with a
            ``NoWeightSyncScheme``). Without a trainer, the server keeps its weights.
    """

    ok: int
    failed: int
    cancelled: int
    rejected: int
    pending: int
    batches: Mapping[DispatchReason, int]
    mean_batch_size: float
    queue_wait: Percentiles
    forward: Percentiles
    request: Percentiles
    failed_passes: int = 0
    policy_version: int = 0
    weight_updates: int = 0
    refused_updates: int = 0
    trainer_connected: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _restored, ({**values, "batches": dict(self.batches)},)  # the view of a mapping does not pickle


def _restored(values: dict[str, Any]) -> ServerStats:
    return ServerStats(**{**values, "batches": MappingProxyType(values["batches"])})


class StatsRecorder:
    """Counts what happens. Any thread records and takes snapshots.

    One batch costs a few microseconds here, whatever its size: times are kept as they are and
    only a snapshot works them out.

    The model thread never waits here: the main thread may hold ``_lock`` while a signal handler of it runs, and that
    may wait for the model thread. So what is recorded goes into ``_news``, and whoever gets the lock works it off.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._news: deque[Callable[[], None]] = deque()
        self._clear()

    def forget_parent(self) -> None:
        """In a forked child: another thread may have held the lock."""
        self._lock = threading.RLock()

    def _clear(self) -> None:
        self._ok = self._failed = self._cancelled = self._rejected = self._batched = self._failed_passes = 0
        self._updates = self._refused_updates = 0
        self._batches: Counter[DispatchReason] = Counter()
        # (submitted_at of each request, taken_at, forward seconds, settled_at) of the latest batches
        self._window: deque[tuple[Sequence[float], float, float, float]] = deque()
        self._in_window = 0

    def _record(self, news: Callable[[], None]) -> None:
        self._news.append(news)
        if threading.current_thread() is threading.main_thread():
            with self._lock:  # the only thread that a signal interrupts: in a with statement it leaves no lock behind
                self._work_off()
        elif self._lock.acquire(blocking=False):
            try:
                self._work_off()
            finally:
                self._lock.release()

    def _work_off(self) -> None:
        """Under the lock."""
        while self._news:
            self._news.popleft()()

    def reject(self) -> None:
        """Count a request that was refused at ``submit``."""
        self._record(partial(self._add, "_rejected", 1))

    def cancel(self, count: int) -> None:
        """Count requests that were dropped because their callers went away."""
        self._record(partial(self._add, "_cancelled", count))

    def fail(self, count: int) -> None:
        """Count requests that ended with an error outside of a forward pass."""
        self._record(partial(self._add, "_failed", count))

    def update(self, *, applied: bool) -> None:
        """Count an update of the weights."""
        self._record(partial(self._add, "_updates" if applied else "_refused_updates", 1))

    def _add(self, name: str, count: int) -> None:
        setattr(self, name, getattr(self, name) + count)

    def batch(
        self,
        *,
        reason: DispatchReason,
        submitted_at: Sequence[float],
        taken_at: float,
        forward: float,
        settled_at: float,
        ok: bool,
        cancelled: int,
    ) -> None:
        """Record one forward pass and the requests that it settled; none if it failed and is run again in parts."""
        self._record(partial(self._add_batch, reason, submitted_at, taken_at, forward, settled_at, ok, cancelled))

    def _add_batch(
        self,
        reason: DispatchReason,
        submitted_at: Sequence[float],
        taken_at: float,
        forward: float,
        settled_at: float,
        ok: bool,
        cancelled: int,
    ) -> None:
        self._batches[reason] += 1
        self._batched += len(submitted_at)
        self._cancelled += cancelled
        if ok:
            self._ok += len(submitted_at) - cancelled
        else:
            self._failed += len(submitted_at) - cancelled
            self._failed_passes += 1
        self._window.append((submitted_at, taken_at, forward, settled_at))
        self._in_window += len(submitted_at)
        while self._in_window > _WINDOW_REQUESTS and len(self._window) > 1:
            self._in_window -= len(self._window.popleft()[0])

    def snapshot(
        self, *, pending: int, version: int = 0, trainer: bool | None = None, reset: bool = False
    ) -> ServerStats:
        """Freeze the counts, beside what the server says of this moment; ``reset`` starts anew in the same step."""
        with self._lock:
            self._work_off()
            window = tuple(self._window)
            counts = (self._ok, self._failed, self._cancelled, self._rejected)
            batches, batched = dict(self._batches), self._batched
            updates, refused_updates, failed_passes = self._updates, self._refused_updates, self._failed_passes
            if reset:
                self._clear()
        passes = sum(batches.values())
        return ServerStats(
            *counts,
            pending=pending,
            batches=MappingProxyType(batches),
            mean_batch_size=batched / passes if passes else 0.0,
            queue_wait=Percentiles.of([taken - at for submitted, taken, _, _ in window for at in submitted]),
            forward=Percentiles.of([forward for _, _, forward, _ in window]),
            request=Percentiles.of([settled - at for submitted, _, _, settled in window for at in submitted]),
            failed_passes=failed_passes,
            policy_version=version,
            weight_updates=updates,
            refused_updates=refused_updates,
            trainer_connected=trainer,
        )
