"""The results as text, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from aioinfer.bench.results import Contest, Results, Summary
from aioinfer.bench.workloads import MAX_BATCH_SIZE, Metric, Pattern, System

__all__ = ["markdown", "text", "to_json"]

_HEADINGS = ("workload", "", "aioinfer", "torchrl", "ratio", "spread", "bar", "aim", "verdict")
_NUMERIC = range(2, 8)


def text(results: Results) -> str:
    """A table and what belongs to it, for a terminal."""
    rows = [_HEADINGS, *_rows(results)]
    parts = ["", _aligned(rows)] if len(rows) > 1 else []
    return "\n".join([*parts, "", *_notes(results)])


def markdown(results: Results) -> str:
    """The same for the documentation."""
    headings = [heading or "figure" for heading in _HEADINGS]
    rules = ["---:" if column in _NUMERIC else "---" for column in range(len(headings))]
    rows = [headings, rules, *_rows(results)]
    table = ["| " + " | ".join(row) + " |" for row in rows] if len(rows) > 2 else []
    return "\n".join([*table, "", *(f"- {note}" for note in _notes(results)), ""])


def to_json(results: Results) -> str:
    """The raw figures of every repeat, and the ratios. Latencies are in seconds, rates in requests/s."""
    return json.dumps(
        {
            "machine": results.machine,
            "seconds": results.seconds,
            "repeats": results.repeats,
            "max_batch_size": MAX_BATCH_SIZE,
            "torchrl_collate": results.torchrl_collate,
            "workloads": {contest.workload.name: _contest_to_dict(contest) for contest in results.contests},
            "crashes": results.crashes,
        },
        indent=2,
    )


def _contest_to_dict(contest: Contest) -> dict[str, object]:
    ratios: list[dict[str, object]] = []
    for metric in contest.workload.metrics:
        ratio = contest.ratio(metric)
        measured = {**asdict(ratio), "verdict": ratio.verdict(metric)} if ratio is not None else {"value": None}
        ratios.append({**asdict(metric), **measured})
    entries = {str(system): asdict(entry) for system, entry in contest.entries.items()}
    return {"summary": contest.workload.summary, "systems": entries, "ratios": ratios}


def _rows(results: Results) -> list[tuple[str, ...]]:
    return [_row(contest, metric) for contest, metric in _judged(results)]


def _judged(results: Results) -> list[tuple[Contest, Metric]]:
    return [(contest, metric) for contest in results.contests for metric in contest.workload.metrics]


def _row(contest: Contest, metric: Metric) -> tuple[str, ...]:
    ratio = contest.ratio(metric)
    sign = ">=" if metric.higher_is_better else "<="
    limits = (f"{sign} {metric.bar:g}", f"{sign} {metric.aim:g}")
    judged = ("-", "-", *limits, "-")
    if ratio is not None:
        spread = f"{_short(ratio.least)} to {_short(ratio.most)}"
        judged = (_short(ratio.value), spread, *limits, ratio.verdict(metric))
    ours, torchrl = (contest.summary(system, metric.figure) for system in (System.OURS, System.TORCHRL))
    name = contest.workload.name
    return name, metric.figure, _figure(ours, metric.figure), _figure(torchrl, metric.figure), *judged


def _figure(summary: Summary | None, figure: str) -> str:
    if summary is None:
        return "-"
    return f"{summary.median:,.0f}/s" if figure == "rate" else f"{summary.median * 1e3:.3f} ms"


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(results: Results) -> list[str]:
    notes = [f"{c.workload.summary}: {_bare(c)}" for c in results.contests if c.workload.pattern is Pattern.BARE]
    notes += [_share(contest, metric) for contest, metric in _judged(results) if metric.against is System.BARE]
    kept = [
        f"{c.workload.name} {' / '.join(entry.way for system, entry in c.entries.items() if system != System.BARE)}"
        for c in results.contests
        if c.workload.pattern is not Pattern.BARE
    ]
    if kept:
        notes.append(f"transports kept (aioinfer / torchrl): {', '.join(kept)}")
    if any(contest.workload.pattern is Pattern.OPEN_LOOP for contest in results.contests):
        notes.append("open-loop latency counts from the actual submit; every system gets the same schedule")
    if results.torchrl_collate == "stack":
        notes.append("torchrl's server was given collate_fn=torch.stack")
    notes += [_method(results), _machine(results)]
    return notes + [f"CRASHED: {crash}" for crash in results.crashes]


def _bare(contest: Contest) -> str:
    summary = contest.summary(System.BARE, "rate")
    return "-" if summary is None else f"{summary.median:,.0f} rows/s ({summary.least:,.0f} to {summary.most:,.0f})"


def _share(contest: Contest, metric: Metric) -> str:
    note = f"{contest.workload.name}: the ratio is the share of the bare forward's rate, {_bare(contest)}"
    torchrl = contest.ratio(metric, System.TORCHRL)
    return note if torchrl is None else f"{note}; torchrl's share is {_short(torchrl.value)}"


def _method(results: Results) -> str:
    return (
        f"medians over {results.repeats} x {results.seconds:g} s, each in a fresh process, the systems by turns; "
        f"max_batch_size={MAX_BATCH_SIZE}, torch.set_num_threads(1)"
    )


def _machine(results: Results) -> str:
    about = results.machine
    versions = [f"{name} {about[name] or 'not installed'}" for name in ("torch", "tensordict", "torchrl")]
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']}, "
        f"{', '.join(versions)}, load at the start {about['load']}, {about['date']}"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in _NUMERIC else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
