"""The results of a run: medians, spreads, ratios and verdicts, and the report as text, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from itertools import starmap
from pathlib import Path

from aioinfer.bench.workloads import MAX_BATCH_SIZE, UNITS, Metric, Pattern, System, Workload, is_rate

Figures = dict[str, float]
"""The figures of one measurement, by name: rates in requests/s or steps/s, times in seconds, counts."""

COUNTS = frozenset({"count", "updates"})
"""The figures that are numbers of measured events."""

FEWEST_TIMES = 2
"""The fewest times of which percentiles are taken."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median of repeats, or a ratio, with the least and the largest value of the repeats."""

    value: float
    least: float
    most: float


@dataclass(slots=True)
class Entry:
    """One system on one workload.

    Attributes:
        way: the transport, or scheme, that was kept.
        heats: a first, short measurement of each of them, which chose ``way`` and counts no further.
        repeats: the figures that count. ``None`` stands for a repeat that crashed.
    """

    way: str
    heats: dict[str, Figures] = field(default_factory=dict)
    repeats: list[Figures | None] = field(default_factory=list)

    def summary(self, figure: str) -> Spread | None:
        """One figure over the repeats; ``None`` without any."""
        values = [repeat[figure] for repeat in self.repeats if repeat is not None and figure in repeat]
        return Spread(statistics.median(values), min(values), max(values)) if values else None


@dataclass(slots=True)
class Comparison:
    """One workload, and the systems that were measured on it."""

    workload: Workload
    entries: dict[System, Entry] = field(default_factory=dict)

    def summary(self, system: System, figure: str) -> Spread | None:
        """One figure of one system; ``None`` if it was not measured."""
        entry = self.entries.get(system)
        return entry.summary(figure) if entry is not None else None

    def ratio(self, metric: Metric, of: System = System.OURS, against: System | None = None) -> Spread | None:
        """A system's figure over that of another one, or the figure alone; ``None`` if either is missing.

        A ratio of medians, as the two were measured one after the other. Two figures of one system are taken by turns
        in each measurement, within fractions of a second; their ratio is the median of those of all measurements.

        Args:
            metric: names the figures.
            of: the one system.
            against: the other one; ``None``: that with which the metric compares.
        """
        divisor = against or metric.against
        if divisor is None:
            return self.summary(of, metric.figure)
        one, other = self.summary(of, metric.figure), self.summary(divisor, metric.divisor)
        if one is None or other is None:
            return None
        repeats = zip(self.entries[of].repeats, self.entries[divisor].repeats, strict=True)
        # Repeats that ran next to each other: other load of the machine hit both.
        pairs = [a[metric.figure] / b[metric.divisor] for a, b in repeats if a is not None and b is not None]
        value = statistics.median(pairs) if divisor is of else one.value / other.value
        return Spread(value, min(pairs, default=value), max(pairs, default=value))


def best_transport(heats: dict[str, Figures], figure: str) -> str:
    """The transport that did best in the heats; the first one if their figures are equal."""
    return (max if is_rate(figure) else min)(heats, key=lambda way: heats[way][figure])


def format_figure(figure: str, value: float) -> str:
    """A rate, a time, or one of ``UNITS``, with its unit."""
    if figure in UNITS:
        return f"{value:.2f} {UNITS[figure]}"
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
        machine: see :func:`describe_machine`.
        seconds: length of a measurement.
        repeats: measurements per system and workload.
        torchrl_collate: how torchrl's server stacks requests, one of ``COLLATES``; ``None`` if it takes no part.
        comparisons: the workloads.
        crashes: the measurements that failed, and why.
        skipped: the workloads that could not be measured, and why.
    """

    machine: dict[str, str | int | None]
    seconds: float
    repeats: int
    torchrl_collate: str | None
    comparisons: list[Comparison] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


_PACKAGES = ("aioinfer", "torch", "tensordict", "torchrl", "gymnasium", "ale-py", "envpool")
_SERVERS = ("uvicorn", "uvloop", "websockets", "litserve", "mosec")


def describe_machine() -> dict[str, str | int | None]:
    """The machine, the versions of packages (``None``: not installed; none is imported), and the date."""
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_PACKAGES, *_SERVERS)},
        "load": _load(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))  # the cores that this process may use
    except AttributeError:
        return os.cpu_count() or 1


def _load() -> str:
    """Load average of the last minute; beside other programs, latencies mean nothing."""
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except (AttributeError, OSError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_HEADINGS = ("workload", "", "aioinfer", "against", "ratio", "spread", "bar", "aim", "verdict")
_STACK_HEADINGS = ("over torch.stack", "its bar")
_NUMERIC = (*range(2, 8), *range(9, 11))


def text(results: Results) -> str:
    """The table and its notes, for a terminal."""
    rows = _table(results)
    parts = ["", _aligned(rows)] if len(rows) > 1 else []
    return "\n".join([*parts, "", *_notes(results)])


def markdown(results: Results) -> str:
    """The table and its notes as Markdown, for the documentation."""
    first, *others = _table(results)
    headings = [heading or "figure" for heading in first]
    rules = ["---:" if column in _NUMERIC else "---" for column in range(len(headings))]
    table = ["| " + " | ".join(row) + " |" for row in (headings, rules, *others)] if others else []
    return "\n".join([*table, "", *(f"- {note}" for note in _notes(results)), ""])


def to_json(results: Results) -> str:
    """The raw figures of every repeat, and the ratios. Times are in seconds, rates in requests/s."""
    return json.dumps(
        {
            "machine": results.machine,
            "seconds": results.seconds,
            "repeats": results.repeats,
            "torchrl_collate": results.torchrl_collate,
            "workloads": {each.workload.name: _comparison_to_dict(each) for each in results.comparisons},
            "crashes": results.crashes,
            "skipped": results.skipped,
        },
        indent=2,
    )


def _comparison_to_dict(comparison: Comparison) -> dict[str, object]:
    ratios: list[dict[str, object]] = []
    for metric in comparison.workload.metrics:
        ratio = comparison.ratio(metric)
        measured = {**asdict(ratio), "verdict": metric.verdict(ratio.value)} if ratio is not None else {"value": None}
        stack = _ratio_over_stack(comparison, metric)
        ratios.append({**asdict(metric), **measured, "over_stack": asdict(stack) if stack is not None else None})
    entries = {str(system): asdict(entry) for system, entry in comparison.entries.items()}
    workload = comparison.workload
    about = {"summary": workload.summary, "max_batch_size": workload.max_batch_size}
    return {**about, "systems": entries, "ratios": ratios}


def _judged(results: Results) -> list[tuple[Comparison, Metric]]:
    return [(comparison, metric) for comparison in results.comparisons for metric in comparison.workload.metrics]


def _table(results: Results) -> list[tuple[str, ...]]:
    """The headings and the rows, with columns for torchrl with ``torch.stack`` where that was measured."""
    judged = _judged(results)
    rows = [_HEADINGS, *starmap(_row, judged)]
    if all(System.STACK not in comparison.entries for comparison in results.comparisons):
        return rows
    more = [_STACK_HEADINGS, *starmap(_stack_cells, judged)]
    return [(*row, *cells) for row, cells in zip(rows, more, strict=True)]


def _stack_cells(comparison: Comparison, metric: Metric) -> tuple[str, str]:
    ratio = _ratio_over_stack(comparison, metric)
    if ratio is None:
        return "-", "-"
    measured = f"{_short(ratio.value)} ({_short(ratio.least)} to {_short(ratio.most)})"
    if metric.stack_bar is None:
        return measured, "-"
    verdict = "met" if metric.meets(ratio.value, metric.stack_bar) else "missed"
    return measured, f"{_sign(metric)} {metric.stack_bar:g}, {verdict}"


def _ratio_over_stack(comparison: Comparison, metric: Metric) -> Spread | None:
    """Our figure over that of torchrl with ``torch.stack``, where ours is compared with torchrl's."""
    return comparison.ratio(metric, against=System.STACK) if metric.against is System.TORCHRL else None


def _row(comparison: Comparison, metric: Metric) -> tuple[str, ...]:
    ratio = comparison.ratio(metric)
    sign, unit = _sign(metric), f" {UNITS[metric.figure]}" if metric.against is None else ""
    limits = (f"{sign} {metric.bar:g}{unit}", f"{sign} {metric.aim:g}{unit}")
    judged = ("-", "-", *limits, "-")
    if ratio is not None:
        spread = f"{_short(ratio.least)} to {_short(ratio.most)}"
        judged = (_short(ratio.value), spread, *limits, metric.verdict(ratio.value))
    ours = _figure(comparison, System.OURS, metric.figure)
    return comparison.workload.name, metric.figure, ours, _against(comparison, metric), *judged


def _sign(metric: Metric) -> str:
    return ">=" if metric.higher_is_better else "<="


def _against(comparison: Comparison, metric: Metric) -> str:
    """The divisor of the ratio: a figure of another system, or another one of ours; none where there is no ratio."""
    if metric.against is None:
        return "-"
    figure = _figure(comparison, metric.against, metric.divisor)
    return figure if figure == "-" else f"{metric.over or metric.against} {figure}"


def _figure(comparison: Comparison, system: System, figure: str) -> str:
    summary = comparison.summary(system, figure)
    return "-" if summary is None else format_figure(figure, summary.value)


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(results: Results) -> list[str]:
    comparisons = results.comparisons
    served = [each for each in comparisons if each.workload.pattern is not Pattern.BARE]
    notes = [f"{each.workload.summary}: {_bare_rate(each)}" for each in comparisons if each not in served]
    notes += [
        _beside_bare(each, metric, system)
        for each, metric in _judged(results)
        for system in _KEPT[1:]
        if metric.against is System.BARE
    ]
    systems = [s for s in _KEPT if any(s in each.entries for each in served)]
    kept = [
        f"{each.workload.name} {' / '.join(each.entries[s].way if s in each.entries else '-' for s in systems)}"
        for each in served
    ]
    if kept:
        notes.append(f"transports or schemes kept ({' / '.join(systems)}): {', '.join(kept)}")
    divisors = {metric.over for _, metric in _judged(results)}
    patterns = {each.workload.pattern for each in comparisons}
    notes += [note for pattern, note in _PATTERN_NOTES.items() if pattern in patterns]
    if any(each.workload.processes for each in comparisons):
        notes.append(_PROCESSES_NOTE)
    notes += [note for figure, note in _DIVISOR_NOTES.items() if figure in divisors]
    for each in comparisons:
        if each.workload.pattern is Pattern.GAP:
            quiet = _figure(each, System.OURS, "quiet gap")
            notes.append(f"{each.workload.name}: the longest gap in as long a time without an update is {quiet}")
    if System.STACK in systems:
        notes.append(_STACK_NOTE)
    about = results.machine
    packages = [
        *(_PACKAGES[1:] if Pattern.COLLECT in patterns else _PACKAGES[1:4]),
        *(_SERVERS if Pattern.SERVE in patterns else ()),
    ]
    versions = [f"{name} {about[name] or 'not installed'}" for name in packages]
    return [
        *filter(None, notes),
        f"medians over {results.repeats} x {results.seconds:g} s, each in a fresh process, the systems by turns; "
        f"max_batch_size={MAX_BATCH_SIZE}, or the rows of a request; with other processes or such requests "
        f"OMP_NUM_THREADS=1",
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']}, "
        f"{', '.join(versions)}, load at the start {about['load']}, {about['date']}",
        *(f"SKIPPED: {name}: {reason}" for name, reason in results.skipped.items()),
        *(f"CRASHED: {crash}" for crash in results.crashes),
    ]


_KEPT = (System.OURS, System.TORCHRL, System.STACK)
"""The systems that may have several transports or schemes."""


_PATTERN_NOTES = {
    Pattern.OPEN_LOOP: "open-loop latency counts from the actual submit; every system gets the same schedule",
    Pattern.SEND: "send(sync=True) counts in the trainer, until a server in another process has applied the weights",
    Pattern.PUBLISHING: "updates come by send(sync=True); the quiet rate is that of the same server without them",
    Pattern.GAP: "gaps are between the beginnings of two forward passes, medians over updates, after gc.freeze()",
    Pattern.COLLECT: "collectors have the same environments and policy (64-64 MLP, or CNN, with sampling and "
    "log-probabilities), torch.set_num_threads(1); SyncVectorEnv, AsyncVectorEnv and EnvPool store nothing, and steps "
    "that only reset count nowhere",
    Pattern.SERVE: "servers over a network have a process of their own, on the loopback interface; openpi's is "
    "re-created from its protocol, robots are processes with a blocking connection each, HTTP callers one event loop",
}
_STACK_NOTE = (
    f"{System.STACK} is torchrl with collate_fn=torch.stack, measured where its server stacks requests; its "
    "transport is chosen anew"
)
_PROCESSES_NOTE = (
    "in other processes torchrl's clients block: where ours are awaited, one thread of a process has the "
    "requests of all its callers under way and waits for the replies in turn or in rounds"
)
_DIVISOR_NOTES = {
    "memcpy": "memcpy is one copy of as many bytes, warm, in the process that is measured, by turns with updates",
    "pass": "a pass is one of the bare model over as many rows, in the caller's thread, by turns with its requests",
    "reused rate": "array and tensor rates are those of client(observation=...) and of a read action, the reused rate "
    "that of one TensorDict again and again; they take turns with the same server and callers",
    "own paces rate": "the rate of own paces is that of the same environments when each steps without a policy",
    "pass rate": "the pass rate is what the model alone would make, by the time of its passes in the running server",
}


def _bare_rate(comparison: Comparison) -> str:
    rate = comparison.summary(System.BARE, "rate")
    return "-" if rate is None else f"{rate.value:,.0f} rows/s ({rate.least:,.0f} to {rate.most:,.0f})"


def _beside_bare(comparison: Comparison, metric: Metric, system: System) -> str:
    ratio = comparison.ratio(metric, system)
    figure = _figure(comparison, system, metric.figure)
    name = f"{comparison.workload.name}: {system}'s {metric.figure}"
    return f"{name} is {figure}, {_short(ratio.value)} of the bare model's" if ratio else ""


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in _NUMERIC else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
