"""Statistics and health of a server: the frozen snapshots that users get, and the recorder that counts."""

from __future__ import annotations

import statistics
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from aioinfer.batching import DispatchReason
from aioinfer.histogram import BATCH_SIZES, SECONDS, HistogramCounts

__all__ = ["BatchRecord", "Health", "Percentiles", "ServerStats", "StatsRecorder", "Totals"]

# Percentiles are over the latest requests; at 4 000 requests/s that is two seconds.
_WINDOW_REQUESTS = 8192

_COUNTS = ("ok", "failed", "cancelled", "rejected", "failed_passes", "weight_updates", "refused_updates")


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
class Totals:
    """What a server did since it was made, whether or not its statistics were reset: what only ever grows.

    Attributes:
        ok: see :class:`ServerStats`, as for the other counts that have the same name there.
        batches: forward passes by the reason of their dispatch, failed ones included.
        rows: rows answered by forward passes.
        batch_sizes: forward passes by their rows.
        forward: forward passes by their seconds.
        held: seconds for which batches were held back, all of them together.
        queued_requests: requests, or parts of them, that a batch took, and that it settled.
        queue_wait: seconds from ``submit`` until a batch took them, all of them together.
        request: seconds from ``submit`` until the reply was handed over, all of them together.
    """

    ok: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    failed_passes: int = 0
    weight_updates: int = 0
    refused_updates: int = 0
    batches: Mapping[DispatchReason, int] = field(default_factory=dict)
    rows: int = 0
    batch_sizes: HistogramCounts = field(default_factory=HistogramCounts)
    forward: HistogramCounts = field(default_factory=HistogramCounts)
    held: float = 0.0
    queued_requests: int = 0
    queue_wait: float = 0.0
    request: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), _picklable(self))


@dataclass(frozen=True, slots=True)
class ServerStats:
    """A snapshot of a server's statistics since it was made, or since the last reset.

    Attributes:
        ok: requests answered with a reply, whatever their number of rows.
        failed: requests answered with an error: the model's, or that the server closed.
        cancelled: requests whose caller cancelled them, or whose deadline passed, before the answer.
        rejected: requests refused at ``submit``: invalid, or the queue was full; or by a pause.
        pending: rows that wait for a batch now; a request without a dimension of rows is one.
        batches: forward passes by the reason of their dispatch, failed ones included.
        failed_passes: forward passes that raised. Where the model raises on several requests, their halves run again: a
            model that can't batch takes ``2n - 1`` passes for ``n`` requests, of which ``n - 1`` fail.
        mean_batch_size: rows answered per forward pass; 0 without one.
        queue_wait: from ``submit`` until a batch took the request, or a part of it.
        held: for how long the model was free and a batch was held back, or gathered; 0 for one that left at once.
        forward: one forward pass: collate, copy to the device, model, copy back.
        request: from ``submit`` until the reply was handed over.
        policy_version: the version of the weights in use, whether or not the statistics were reset.
        weight_updates: updates of the weights that were applied.
        refused_updates: updates that did not fit, or had no weights.
        trainer_connected: whether a trainer has published weights for this server and is still there; ``None``
            before the server's first start, and where nothing is received (without ``weight_sync``, or with a
            ``NoWeightSyncScheme``). Without a trainer, the server keeps its weights.
        pass_seconds: what a forward pass takes in seconds by its number of rows, as the server has learned it to decide
            when batches leave, whether or not the statistics were reset.
        think_time: seconds from a reply to its caller's next request, over the callers that come back, as learned.
        callers: how many callers come back, as learned: at most 256 are known.
        batch_sizes: forward passes by their number of rows, over those of the latest requests.
        totals: what was counted since the server was made, whether or not the statistics were reset.
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
    held: Percentiles = Percentiles()
    pass_seconds: Mapping[int, float] = field(default_factory=dict)
    think_time: Percentiles = Percentiles()
    callers: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), _picklable(self))


def _picklable(snapshot: Totals | ServerStats) -> dict[str, Any]:
    values = {one.name: getattr(snapshot, one.name) for one in fields(snapshot)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _restored(kind: Callable[..., Totals | ServerStats], values: dict[str, Any]) -> Totals | ServerStats:
    # A view of a mapping can't be pickled.
    return kind(**{name: MappingProxyType(one) if isinstance(one, dict) else one for name, one in values.items()})


@dataclass(frozen=True, slots=True)
class Health:
    """The health of a server: ``alive`` is about its process or its model thread, ``ready`` about whether it serves.

    Attributes:
        alive: whether the process runs, for a server in a process of its own; otherwise whether the model thread runs.
        ready: whether the server serves requests.
        pid: the process that serves; ``None`` before a server in a process of its own has started.
        policy_version: the version of the weights in use; ``None`` if the process did not answer.
        pending: number of rows that wait now; ``None`` if the process did not answer.
        exit_code: of a process that has ended; a negative one is the signal that killed it; ``None`` if unknown.
        reason: why the server is not ready: it starts, it does not answer, its model thread died, it was killed, it is
            shut down. Empty if it is ready.
    """

    alive: bool
    ready: bool
    pid: int | None = None
    policy_version: int | None = None
    pending: int | None = None
    exit_code: int | None = None
    reason: str = ""


class BatchRecord(NamedTuple):
    """One forward pass, and the requests that it settled: none if it failed and its halves run again."""

    reason: DispatchReason
    submitted_at: Sequence[float]  # of each request, by time.perf_counter as all times here
    taken_at: float  # when the batch left the queue
    held: float  # seconds for which it was held back before
    forward: float  # seconds of the pass
    settled_at: float  # when the replies were handed over
    ok: bool
    cancelled: int  # requests whose callers had gone away
    rows: int
    parts: int  # how many of the requests are parts of one, which is counted when it is settled


class StatsRecorder:
    """Counts requests, batches and weight updates. Any thread records and takes snapshots.

    One batch costs a few microseconds here, whatever its size: times are kept as they are, and only a snapshot
    computes percentiles.

    The model thread never waits here: the main thread may hold ``_lock`` while a signal handler of it runs, and that
    handler may wait for the model thread. So a thread appends its record to ``_records``, and the next thread that
    gets the lock counts it. All other attributes belong to the holder of the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._records: deque[Callable[[], None]] = deque()
        # What is counted for good; what snapshots have is the difference to the counts at the latest reset.
        self._counts: Counter[str] = Counter()  # by the names that they have in ServerStats
        self._batches: Counter[DispatchReason] = Counter()
        self._rows = 0
        self._batch_sizes: Counter[int] = Counter()
        self._forward_counts = [0] * (len(SECONDS) + 1)
        self._forward = self._held = self._queue_wait = self._after_queue = 0.0  # seconds of all requests or passes
        self._queued_requests = 0
        self._clear()

    def forget_parent(self) -> None:
        """In a forked child: another thread may have held the lock."""
        self._lock = threading.RLock()

    def _clear(self) -> None:
        self._counts_before = self._counts.copy()
        self._batches_before = self._batches.copy()
        self._rows_before = self._rows
        self._window: deque[BatchRecord] = deque()  # the latest batches
        self._in_window = 0

    def _record(self, count: Callable[[], None]) -> None:
        self._records.append(count)
        if threading.current_thread() is threading.main_thread():
            with self._lock:  # the only thread that a signal interrupts: a with statement leaves no lock behind
                self._count_records()
        elif self._lock.acquire(blocking=False):
            try:
                self._count_records()
            finally:
                self._lock.release()

    def _count_records(self) -> None:
        """Under the lock."""
        while self._records:
            self._records.popleft()()

    def reject(self, count: int = 1) -> None:
        """Count requests that were refused at ``submit``, or by a pause."""
        self._record(partial(self._add, "rejected", count))

    def cancel(self, count: int) -> None:
        """Count requests that were dropped because their callers went away."""
        self._record(partial(self._add, "cancelled", count))

    def succeed(self, count: int) -> None:
        """Count requests that were answered outside of a forward pass."""
        self._record(partial(self._add, "ok", count))

    def fail(self, count: int) -> None:
        """Count requests that ended with an error outside of a forward pass."""
        self._record(partial(self._add, "failed", count))

    def update(self, *, applied: bool) -> None:
        """Count an update of the weights."""
        self._record(partial(self._add, "weight_updates" if applied else "refused_updates", 1))

    def batch(self, batch: BatchRecord) -> None:
        """Count one forward pass and the requests that it settled."""
        self._record(partial(self._add_batch, batch))

    def _add(self, name: str, count: int) -> None:
        self._counts[name] += count

    def _add_batch(self, batch: BatchRecord) -> None:
        requests = len(batch.submitted_at)
        taken_at, forward, rows = batch.taken_at, batch.forward, batch.rows
        self._batches[batch.reason] += 1
        self._rows += rows
        self._batch_sizes[rows] += 1
        self._forward_counts[bisect_left(SECONDS, forward)] += 1
        self._forward += forward
        self._held += batch.held
        self._queued_requests += requests
        self._after_queue += requests * (batch.settled_at - taken_at)
        queue_wait = requests * taken_at - sum(batch.submitted_at)
        if queue_wait > 0:  # it is rounded
            self._queue_wait += queue_wait
        self._counts["cancelled"] += batch.cancelled
        self._counts["ok" if batch.ok else "failed"] += requests - batch.parts - batch.cancelled
        self._counts["failed_passes"] += not batch.ok
        self._window.append(batch)
        self._in_window += requests
        while self._in_window > _WINDOW_REQUESTS and len(self._window) > 1:
            self._in_window -= len(self._window.popleft().submitted_at)

    def snapshot(
        self,
        *,
        pending: int,
        version: int = 0,
        trainer: bool | None = None,
        pass_seconds: Mapping[int, float] | None = None,
        think_times: Sequence[float] = (),
        reset: bool = False,
    ) -> ServerStats:
        """Freeze the counts, beside the server's own values of this moment; ``reset`` starts anew in the same step."""
        with self._lock:
            self._count_records()
            window, totals = tuple(self._window), self._totals()
            counts, batches = self._counts - self._counts_before, self._batches - self._batches_before
            rows = self._rows - self._rows_before
            if reset:
                self._clear()
        passes = sum(batches.values())
        return ServerStats(
            **{name: counts[name] for name in _COUNTS},
            pending=pending,
            batches=MappingProxyType(dict(batches)),
            mean_batch_size=rows / passes if passes else 0.0,
            queue_wait=Percentiles.of([batch.taken_at - at for batch in window for at in batch.submitted_at]),
            forward=Percentiles.of([batch.forward for batch in window]),
            request=Percentiles.of([batch.settled_at - at for batch in window for at in batch.submitted_at]),
            policy_version=version,
            trainer_connected=trainer,
            held=Percentiles.of([batch.held for batch in window]),
            pass_seconds=MappingProxyType(dict(pass_seconds or {})),
            think_time=Percentiles.of(think_times),
            callers=len(think_times),
            batch_sizes=MappingProxyType(dict(Counter([batch.rows for batch in window]))),
            totals=totals,
        )

    def _totals(self) -> Totals:
        """Under the lock."""
        return Totals(
            **{name: self._counts[name] for name in _COUNTS},
            batches=MappingProxyType(dict(self._batches)),
            rows=self._rows,
            batch_sizes=_histogram_of(self._batch_sizes),
            forward=HistogramCounts(SECONDS, tuple(self._forward_counts), self._forward),
            held=self._held,
            queued_requests=self._queued_requests,
            queue_wait=self._queue_wait,
            request=self._queue_wait + self._after_queue,
        )


def _histogram_of(batch_sizes: Mapping[int, int]) -> HistogramCounts:
    counts = [0] * (len(BATCH_SIZES) + 1)
    for size, batches in batch_sizes.items():
        counts[bisect_left(BATCH_SIZES, size)] += batches
    return HistogramCounts(BATCH_SIZES, tuple(counts), float(sum(size * n for size, n in batch_sizes.items())))
