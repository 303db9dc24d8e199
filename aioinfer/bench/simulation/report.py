"""What a simulation found, as text."""

from __future__ import annotations

from collections.abc import Sequence

from aioinfer.bench.simulation.comparison import SIMPLE, Comparison, Figures

__all__ = ["HEADER", "line", "summary"]

_WIDTH = 52

HEADER = (
    "Mean latency in ms: leave when free; full batches of (n); a timer of (n, ms); a learned linear model; ours.\n"
    "Then ours by the best of the others: latency, throughput; p99 and cold start of ours by leave when free.\n"
    + " " * _WIDTH
    + "".join([f"{name:>19}" if name == "timer" else f"{name:>13}" for name in (*SIMPLE, "ours")])
    + "   latency   thrpt     p99    cold"
)


def line(comparison: Comparison) -> str:
    """Return the line of a case."""

    def cell(figures: Figures, width: int) -> str:
        about = f" ({figures.about.replace(' ms', '')})" if figures.about else ""
        return f"{figures.latency * 1000:.3f}{about}".rjust(width)

    rules = comparison.rules
    cells = [cell(rules[name], 19 if name == "timer" else 13) for name in (*SIMPLE, "ours")]
    free, ours = rules["free"], rules["ours"]
    ratios = (
        comparison.latency_ratio("ours"),
        comparison.throughput_ratio("ours"),
        ours.p99 / free.p99,
        ours.cold / free.cold,
    )
    verdict = "PASS" if comparison.as_good_as_simple("ours") else "MISS"
    return f"{comparison.case:<{_WIDTH}}{''.join(cells)}  {''.join([f'{ratio:8.3f}' for ratio in ratios])}  {verdict}"


def summary(comparisons: Sequence[Comparison]) -> str:
    """Return the counts."""
    good = sum([comparison.as_good_as_simple("ours") for comparison in comparisons])
    return f"At most 5 % worse than the best simple rule: {good} of {len(comparisons)}"
