"""Runs the measurements: each in a fresh process, the systems by turns. The main thread does all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from importlib.util import find_spec

from aioinfer.bench.report import COUNTS, Comparison, Entry, Figures, Results, best_transport, format_figure
from aioinfer.bench.workloads import Job, System, Workload, named

MODULE = "aioinfer.bench.measure"
"""What the process of a measurement runs."""

# For measurements with other processes, which need a core, and those of large batches, which the bare model computes in
# one thread. torch.set_num_threads does not reach a server's own thread until an operator there asks for it, and those
# for a few rows don't: OpenMP's threads would spin on all cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# All in seconds.
_WARM_UP = 0.4
_HEAT = 0.5
IMPORT_LIMIT = 120.0
_HANG_LIMIT = 30.0
_COLLECTOR_LIMIT = 90.0  # more; torchrl's takes half a minute to begin with processes, and ours a million frames
_END_LIMIT = 60.0


class MeasurementError(Exception):
    """A measurement crashed or hung."""


class Runner:
    """Fills ``results``, one workload at a time.

    Where a system has several transports or schemes, a short heat of each chooses the one that is then measured:
    to measure all of them in full would double the time, and to take the best of the figures that count would
    favour the system with more ways.

    Args:
        results: where the figures go.
    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def measure(self, workload: Workload, label: str) -> None:
        """Measure all systems on ``workload`` and print the figures of each round; or note why that can't be."""
        missing = [module for module in workload.requires if find_spec(module) is None]
        if missing:
            self._results.skipped[workload.name] = f"{' and '.join(missing)} is not installed"
            print(f"{label}: skipped, {self._results.skipped[workload.name]}", file=sys.stderr, flush=True)
            return
        comparison = Comparison(workload)
        self._results.comparisons.append(comparison)
        for system, way_figures in self._heats(workload, label).items():
            entry = Entry(best_transport(way_figures, _figure(workload)) if way_figures else workload.ways(system)[0])
            entry.heats = way_figures
            comparison.entries[system] = entry
        for repeat in range(self._results.repeats):
            jobs = [
                self._job(workload, system, entry.way, self._results.seconds, seed=repeat + 1)
                for system, entry in comparison.entries.items()
            ]
            figures = self._run(jobs, f"{label}, repeat {repeat + 1}/{self._results.repeats}")
            for entry, found in zip(comparison.entries.values(), figures, strict=True):
                entry.repeats.append(found)

    def _heats(self, workload: Workload, label: str) -> dict[System, dict[str, Figures]]:
        heats: dict[System, dict[str, Figures]] = {
            system: {} for system in workload.systems(self._results.torchrl_collate)
        }
        seconds = min(_HEAT, self._results.seconds)
        tried = [(system, way) for system in heats for way in workload.ways(system) if len(workload.ways(system)) > 1]
        figures = self._run([self._job(workload, *each, seconds) for each in tried], f"{label}, heat")
        for (system, way), found in zip(tried, figures, strict=True):
            if found is not None:
                heats[system][way] = found
        return heats

    def _job(self, workload: Workload, system: System, way: str, seconds: float, seed: int = 0) -> Job:
        warm_up = min(_WARM_UP, seconds)
        return Job(workload.name, system, way, warm_up * workload.stretch, seconds * workload.stretch, seed)

    def _run(self, jobs: Sequence[Job], label: str) -> list[Figures | None]:
        if not jobs:
            return []
        found: list[Figures | None] = []
        words: list[str] = []
        for job, outcome in zip(jobs, measure_in_turn(jobs), strict=True):
            if isinstance(outcome, MeasurementError):
                self._results.crashes.append(f"{label}, {_label(job)}: {outcome}")
                words.append(f"{_label(job)} crashed")
                found.append(None)
            else:
                words.append(f"{_label(job)} {_progress(outcome)}")
                found.append(outcome)
        print(f"{label}: {', '.join(words)}", file=sys.stderr, flush=True)
        return found


def measure_in_turn(jobs: Sequence[Job]) -> list[Figures | MeasurementError]:
    """Start a process for each job, all at once, and let them measure one after the other.

    They import at the same time and sleep until it is their turn.
    """
    with ExitStack() as opened:
        processes = [opened.enter_context(closing(_Process(job))) for job in jobs]
        failures = [process.wait_until_ready() for process in processes]
        return [failure or process.measure() for process, failure in zip(processes, failures, strict=True)]


class _Process:
    """A process that makes one measurement; see ``aioinfer.bench.measure``."""

    def __init__(self, job: Job) -> None:
        workload = named(job.workload)
        self._limit = _HANG_LIMIT + 5 * (job.warm_up + job.seconds)
        if workload.collection is not None or workload.serving is not None:
            self._limit += _COLLECTOR_LIMIT
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - until close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, json.dumps(asdict(job))],
            env=os.environ | (_ONE_THREAD if workload.one_thread else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def wait_until_ready(self) -> MeasurementError | None:
        line, hung = self._read(IMPORT_LIMIT)
        return None if line == "ready\n" else self._failure(hung)

    def measure(self) -> Figures | MeasurementError:
        try:
            self._stdin.write("go\n")
            self._stdin.flush()
        except OSError:  # it died while it waited
            return self._failure(hung=False)
        line, hung = self._read(self._limit)
        if not line.endswith("\n"):
            return self._failure(hung)
        figures: Figures = json.loads(line)
        try:
            # Until it is gone, its server winds down and would disturb the next one.
            self._process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            return MeasurementError(f"did not end within {_END_LIMIT:g} s after it had measured")
        return figures if self._process.returncode == 0 else self._failure(hung=False)

    def close(self) -> None:
        """Kill the process if it still runs."""
        self._process.kill()
        with suppress(OSError):  # a line that it never read
            self._stdin.close()
        self._stdout.close()
        self._process.wait()
        self._errors.close()

    def _read(self, limit: float) -> tuple[str, bool]:
        """A line, empty if the process ended without; and whether that was because it hung."""
        fired = threading.Event()

        def kill() -> None:
            fired.set()
            self._process.kill()

        guard = threading.Timer(limit, kill)
        guard.start()
        try:
            return self._stdout.readline(), fired.is_set()
        finally:
            guard.cancel()
            guard.join()

    def _failure(self, hung: bool) -> MeasurementError:
        if hung:
            return MeasurementError("hung and was killed")
        try:
            status = self._process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            return MeasurementError("said what was not expected")
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["it said nothing"]
        return MeasurementError(f"exit status {status}, {last[0]}")


def _figure(workload: Workload) -> str:
    return workload.metrics[0].figure if workload.metrics else "rate"


def _label(job: Job) -> str:
    return job.system if job.way == "none" else f"{job.system} ({job.way})"


def _progress(figures: Figures) -> str:
    return " ".join(f"{name} {format_figure(name, value)}" for name, value in figures.items() if name not in COUNTS)
