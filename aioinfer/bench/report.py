"""The results as text, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from aioinfer.bench.results import Contest, Results, shown
from aioinfer.bench.workloads import MAX_BATCH_SIZE, Metric, Pattern, System

__all__ = ["markdown", "text", "to_json"]

_HEADINGS = ("workload", "", "aioinfer", "against", "ratio", "spread", "bar", "aim", "verdict")
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
    """The raw figures of every repeat, and the ratios. Times are in seconds, rates in requests/s."""
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
    ours = _figure(contest, System.OURS, metric.figure)
    return contest.workload.name, metric.figure, ours, _against(contest, metric), *judged


def _against(contest: Contest, metric: Metric) -> str:
    """What the ratio is over: another's figure, or another figure of ours."""
    figure = _figure(contest, metric.against, metric.divisor)
    return figure if figure == "-" else f"{metric.over or metric.against} {figure}"


def _figure(contest: Contest, system: System, figure: str) -> str:
    summary = contest.summary(system, figure)
    return "-" if summary is None else shown(figure, summary.median)


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(results: Results) -> list[str]:
    notes = [f"{c.workload.summary}: {_bare(c)}" for c in results.contests if c.workload.pattern is Pattern.BARE]
    notes += filter(None, [_share(contest, metric) for contest, metric in _judged(results)])
    kept = [
        f"{c.workload.name} {' / '.join(entry.way for system, entry in c.entries.items() if system != System.BARE)}"
        for c in results.contests
        if c.workload.pattern is not Pattern.BARE
    ]
    if kept:
        notes.append(f"transports or schemes kept (aioinfer / torchrl): {', '.join(kept)}")
    patterns = {contest.workload.pattern for contest in results.contests}
    notes += [note for pattern, note in _ABOUT.items() if pattern in patterns]
    if any(contest.workload.processes for contest in results.contests):
        notes.append(
            "in other processes torchrl's clients block: where ours are awaited, one thread of a process has the "
            "requests of all its callers under way and waits for the replies in turn or in rounds"
        )
    if any(metric.over == "memcpy" for _, metric in _judged(results)):
        notes.append(
            "memcpy is one copy of as many bytes, warm, in the process that is measured, by turns with updates"
        )
    notes += [_quiet(contest) for contest in results.contests if contest.workload.pattern is Pattern.GAP]
    if results.torchrl_collate == "stack":
        notes.append("torchrl's server was given collate_fn=torch.stack")
    notes += [_method(results), _machine(results)]
    return notes + [f"CRASHED: {crash}" for crash in results.crashes]


_ABOUT = {
    Pattern.OPEN_LOOP: "open-loop latency counts from the actual submit; every system gets the same schedule",
    Pattern.SEND: "send(sync=True) counts in the trainer, until a server in another process has applied the weights",
    Pattern.PUBLISHING: "updates come by send(sync=True); the quiet rate is that of the same server without them",
    Pattern.GAP: "gaps are between the beginnings of two forward passes, medians over updates, after gc.freeze()",
}


def _quiet(contest: Contest) -> str:
    figure = _figure(contest, System.OURS, "quiet gap")
    return f"{contest.workload.name}: the longest gap in as long a time without an update is {figure}"


def _bare(contest: Contest) -> str:
    summary = contest.summary(System.BARE, "rate")
    return "-" if summary is None else f"{summary.median:,.0f} rows/s ({summary.least:,.0f} to {summary.most:,.0f})"


def _share(contest: Contest, metric: Metric) -> str | None:
    torchrl = contest.ratio(metric, System.TORCHRL) if metric.against is System.BARE else None
    if torchrl is None:
        return None
    rate = _figure(contest, System.TORCHRL, metric.figure)
    return f"{contest.workload.name}: torchrl's share is {_short(torchrl.value)}, {rate}"


def _method(results: Results) -> str:
    return (
        f"medians over {results.repeats} x {results.seconds:g} s, each in a fresh process, the systems by turns; "
        f"max_batch_size={MAX_BATCH_SIZE}; with other processes OMP_NUM_THREADS=1"
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
