"""Histograms: how many values fell between which bounds."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

__all__ = ["BATCH_SIZES", "SECONDS", "Histogram", "HistogramCounts"]

SECONDS = (50e-6, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the buckets of durations. A policy may take less than the first bound that others have."""
BATCH_SIZES = tuple(float(2**power) for power in range(13))
"""Upper bounds of the buckets of batch sizes: 1 to 4096 rows."""


@dataclass(frozen=True, slots=True)
class HistogramCounts:
    """What a histogram has counted.

    Attributes:
        bounds: upper bounds of the buckets, ascending; each is inside its bucket.
        counts: how many values are in each bucket, and, last, how many are above all bounds.
        sum: of the values.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Histogram:
    """Counts values in buckets, in 0.2 us for each.

    Args:
        bounds: their upper bounds, ascending; a last bucket has the rest.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def counted(self) -> HistogramCounts:
        """What was counted so far."""
        return HistogramCounts(self._bounds, tuple(self._counts), self._sum)
