"""What was measured, and what it means: medians, spreads, ratios, verdicts. Pure arithmetic."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from aioinfer.bench.workloads import Metric, System, Workload, is_rate

__all__ = [
    "COUNTS",
    "FEWEST_TIMES",
    "Contest",
    "Entry",
    "Figures",
    "Ratio",
    "Results",
    "Summary",
    "better",
    "percentiles",
    "shown",
]

Figures = dict[str, float]
"""What one measurement found, by name: rates in requests/s, times in seconds, counts."""

COUNTS = frozenset({"count", "updates"})
"""The figures that say over how much the others were taken."""

FEWEST_TIMES = 2
"""Of fewer no percentiles are taken."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The median of several repeats, and how far they spread."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Our figure over another's: the medians' ratio, and the spread of the repeats' own ratios."""

    value: float
    least: float
    most: float

    def verdict(self, metric: Metric) -> str:
        """Whether it meets the aim, the bar, or neither."""
        for limit, words in ((metric.aim, "aim met"), (metric.bar, "bar met")):
            if self.value >= limit if metric.higher_is_better else self.value <= limit:
                return words
        return "bar missed"


@dataclass(slots=True)
class Entry:
    """One system on one workload.

    Attributes:
        way: the transport, or scheme, that was kept.
        heats: a first, short measurement of each of them, which chose ``way``. It is not counted otherwise.
        repeats: the figures that count. ``None`` stands for a repeat that crashed.
    """

    way: str
    heats: dict[str, Figures] = field(default_factory=dict)
    repeats: list[Figures | None] = field(default_factory=list)

    def summary(self, figure: str) -> Summary | None:
        """One figure over the repeats; ``None`` without any."""
        values = [repeat[figure] for repeat in self.repeats if repeat is not None and figure in repeat]
        return Summary.of(values) if values else None


@dataclass(slots=True)
class Contest:
    """One workload and all who took part in it."""

    workload: Workload
    entries: dict[System, Entry] = field(default_factory=dict)

    def summary(self, system: System, figure: str) -> Summary | None:
        """One figure of one system; ``None`` if it was not measured."""
        entry = self.entries.get(system)
        return entry.summary(figure) if entry is not None else None

    def ratio(self, metric: Metric, of: System = System.OURS) -> Ratio | None:
        """A system's figure over the one that the metric compares with; ``None`` if either is missing."""
        one, other = self.summary(of, metric.figure), self.summary(metric.against, metric.divisor)
        if one is None or other is None:
            return None
        value = one.median / other.median
        repeats = zip(self.entries[of].repeats, self.entries[metric.against].repeats, strict=True)
        # Repeats that ran next to each other: what the machine did meanwhile hit both.
        pairs = [a[metric.figure] / b[metric.divisor] for a, b in repeats if a is not None and b is not None]
        return Ratio(value, min(pairs, default=value), max(pairs, default=value))


def better(heats: dict[str, Figures], figure: str) -> str:
    """The transport that did best in the heats; the first one if their figures are equal."""
    return (max if is_rate(figure) else min)(heats, key=lambda way: heats[way][figure])


def shown(figure: str, value: float) -> str:
    """A rate or a time with its unit."""
    return f"{value:,.0f}/s" if is_rate(figure) else f"{value * 1e3:.3f} ms"


def percentiles(times: list[float]) -> Figures:
    """``p50`` and ``p99`` of ``count`` times."""
    if len(times) < FEWEST_TIMES:
        raise RuntimeError(f"{len(times)} times are too few for percentiles; measure for longer")
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "count": len(times)}


@dataclass(slots=True)
class Results:
    """A whole run.

    Attributes:
        machine: what it ran on.
        seconds: length of a measurement.
        repeats: measurements per system and workload.
        torchrl_collate: how torchrl stacked requests; ``None`` if it took no part.
        contests: the workloads.
        crashes: the measurements that failed, and why.
    """

    machine: dict[str, str | int | None]
    seconds: float
    repeats: int
    torchrl_collate: str | None
    contests: list[Contest] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
