"""What a simulation found, as text."""

from __future__ import annotations

from collections.abc import Sequence

from aioinfer.bench.simulation.comparison import SIMPLE, Comparison, Figures

__all__ = ["HEADER", "line", "summary", "update_page"]

_WIDTH = 52

HEADER = (
    "Mean latency in ms: leave when free; full batches of (n); a timer of (n, ms); a learned linear model; ours.\n"
    "Then ours by the best of the others: latency, throughput; p99 and cold start of ours by leave when free;\n"
    "latency by that of a clairvoyant, and by a bound that nobody can beat.\n"
    + " " * _WIDTH
    + "".join([f"{name:>19}" if name == "timer" else f"{name:>13}" for name in (*SIMPLE, "ours")])
    + "   latency   thrpt     p99    cold  clairv.   bound"
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
        comparison.clairvoyant_ratio("ours"),
        comparison.bound_ratio("ours"),
    )
    verdict = "PASS" if comparison.as_good_as_simple("ours") else "MISS"
    return f"{comparison.case:<{_WIDTH}}{''.join(cells)}  {''.join([f'{ratio:8.3f}' for ratio in ratios])}  {verdict}"


def summary(comparisons: Sequence[Comparison]) -> str:
    """Return the counts."""
    good = sum([comparison.as_good_as_simple("ours") for comparison in comparisons])
    near = sum([comparison.clairvoyant_ratio("ours") <= 1.1 for comparison in comparisons])
    nearest = sum([comparison.bound_ratio("ours") <= 1.1 for comparison in comparisons])
    return (
        f"Of {len(comparisons)} cases: at most 5 % worse than the best simple rule in {good}, "
        f"within 10 % of the clairvoyant in {near}, of the bound in {nearest}"
    )


def update_page(page: str, comparisons: Sequence[Comparison]) -> str:
    """Return a page of the documentation with the table between its two comments.

    Raises:
        ValueError: the page has no such comments.
    """
    before, begin, rest = page.partition("<!-- aioinfer simulate -->\n")
    _, end, after = rest.partition("<!-- end of aioinfer simulate -->\n")
    if not end:
        raise ValueError("the page has no comments <!-- aioinfer simulate --> and <!-- end of aioinfer simulate -->")
    return f"{before}{begin}\n{_markdown(comparisons)}\n{end}{after}"


def _markdown(comparisons: Sequence[Comparison]) -> str:
    headings = ["callers", "a pass takes", "free", "full (n)", "timer (n, time)", "linear", "aioinfer"]
    headings += ["latency", "throughput", "by clairvoyant"]
    rows = [headings, ["---", "---", *["---:"] * 8]]
    for comparison in comparisons:
        cells = [
            f"{figures.latency * 1000:.2f}{f' ({figures.about})' if figures.about else ''}"
            for figures in [comparison.rules[name] for name in (*SIMPLE, "ours")]
        ]
        ratios = (
            comparison.latency_ratio("ours"),
            comparison.throughput_ratio("ours"),
            comparison.clairvoyant_ratio("ours"),
        )
        rows.append([*comparison.case.split("; "), *cells, *[f"{ratio:.2f}" for ratio in ratios]])
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", summary(comparisons) + ".", ""])
