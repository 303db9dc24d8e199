from __future__ import annotations

import dataclasses
import pickle
import threading
import weakref

import pytest

from aioinfer import DispatchReason, Percentiles, ServerStats
from aioinfer.stats import BatchRecord, StatsRecorder


class Times(list[float]):
    """A list, whose end can be seen."""


def record(recorder: StatsRecorder, count: int, *, ok: bool = True, cancelled: int = 0) -> None:
    submitted_at = [float(i) for i in range(count)]
    recorder.batch(BatchRecord(DispatchReason.IDLE, submitted_at, 100.0, 0.25, 0.5, 101.0, ok, cancelled, count, 0))


def test_percentiles_are_those_of_the_definition() -> None:
    assert Percentiles.of([float(i) for i in range(101)]) == Percentiles(50, 95, 99)
    assert Percentiles.of([3.0]) == Percentiles(3, 3, 3)
    assert Percentiles.of([]) == Percentiles(0, 0, 0)


def test_requests_are_counted_by_outcome_and_batches_by_reason() -> None:
    recorder = StatsRecorder()
    record(recorder, 4)
    record(recorder, 3, cancelled=1)
    record(recorder, 2, ok=False)
    recorder.reject()
    recorder.cancel(5)
    recorder.fail(1)
    stats = recorder.snapshot(pending=7)
    assert (stats.ok, stats.failed, stats.cancelled, stats.rejected, stats.pending) == (6, 3, 6, 1, 7)
    assert dict(stats.batches) == {DispatchReason.IDLE: 3}
    assert stats.mean_batch_size == 3
    assert stats.forward == Percentiles(0.5, 0.5, 0.5)
    assert stats.queue_wait.p50 == 99
    assert stats.request.p50 == 100


def test_a_reset_starts_anew() -> None:
    recorder = StatsRecorder()
    empty = recorder.snapshot(pending=0)
    record(recorder, 4)
    counted = recorder.snapshot(pending=0, reset=True)
    assert counted.ok == 4
    assert recorder.snapshot(pending=0) == dataclasses.replace(empty, totals=counted.totals)


def test_totals_only_grow() -> None:
    recorder = StatsRecorder()
    record(recorder, 4)
    first = recorder.snapshot(pending=0, reset=True).totals
    assert (first.ok, first.rows, first.queued_requests) == (4, 4, 4)
    assert first.queue_wait == 100.0 + 99.0 + 98.0 + 97.0
    assert first.request == first.queue_wait + 4
    assert first.held == 0.25
    record(recorder, 3, ok=False)
    recorder.reject()
    second = recorder.snapshot(pending=0)
    assert (second.ok, second.failed, second.totals.ok, second.totals.failed) == (0, 3, 4, 3)
    assert (second.totals.rejected, second.totals.failed_passes) == (1, 1)
    assert dict(second.totals.batches) == {DispatchReason.IDLE: 2}
    assert (second.totals.batch_sizes.count, second.totals.batch_sizes.sum) == (2, 7)
    assert (second.totals.forward.count, second.totals.forward.sum) == (2, 1.0)
    assert second.mean_batch_size == 3


def test_the_sizes_of_the_latest_batches_are_counted() -> None:
    recorder = StatsRecorder()
    for size in (4, 1, 4):
        record(recorder, size)
    assert dict(recorder.snapshot(pending=0).batch_sizes) == {4: 2, 1: 1}


def test_a_snapshot_travels_to_another_process() -> None:
    recorder = StatsRecorder()
    record(recorder, 4)
    stats = recorder.snapshot(pending=0, pass_seconds={1: 0.5})
    assert pickle.loads(pickle.dumps(stats)) == stats


def test_a_snapshot_is_frozen() -> None:
    stats = StatsRecorder().snapshot(pending=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.ok = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        stats.batches[DispatchReason.FULL] = 1  # type: ignore[index]


def test_memory_is_bounded() -> None:
    recorder = StatsRecorder()
    kept: list[weakref.ref[Times]] = []

    def record_times(count: int) -> None:
        times = Times(range(count))
        kept.append(weakref.ref(times))
        recorder.batch(BatchRecord(DispatchReason.IDLE, times, 100.0, 0.0, 0.5, 101.0, True, 0, count, 0))

    def sizes() -> list[int]:
        return [len(times) for ref in kept if (times := ref()) is not None]

    for _ in range(10_000):
        record_times(64)
    assert sizes() == [64] * 128
    record_times(20_000)
    assert sizes() == [20_000]


def test_refusals_from_many_threads_are_all_counted() -> None:
    recorder = StatsRecorder()

    def reject() -> None:
        for _ in range(1000):
            recorder.reject()

    threads = [threading.Thread(target=reject) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats: ServerStats = recorder.snapshot(pending=0)
    assert stats.rejected == 8000
