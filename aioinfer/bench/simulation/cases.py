"""The pairs of traces and costs on which rules are compared."""

from __future__ import annotations

from dataclasses import dataclass

from aioinfer.bench.simulation.costs import COSTS, Cost
from aioinfer.bench.simulation.simulator import Arrivals
from aioinfer.bench.simulation.traces import (
    Bursts,
    ClosedLoop,
    Poisson,
    Turnover,
    equal,
    exponential,
    halves,
    ladder,
    lognormal,
    pareto,
    pausing,
    stragglers,
)

__all__ = ["CASES", "DRAWN", "Case"]

_MS = 0.001


@dataclass(frozen=True, slots=True)
class Case:
    """A trace and a cost.

    Attributes:
        trace: who asks, and when.
        cost: of the forward passes.
        seeds: how many runs, with different draws; a figure is the mean over them.
        max_batch_size: most rows in one pass.
    """

    trace: Arrivals
    cost: Cost
    seeds: int = 4
    max_batch_size: int = 64

    @property
    def name(self) -> str:
        return f"{self.trace.name}; {self.cost.name}"


_TEN = "10 ms"
_LINEAR = "n ms"
_GPU = "5 + 0.2 n ms"
_CPU = "1 + n ms"
_TINY = "0.2 + 0.005 n ms"
_NOISY = "10 ms ± 30 %"
_SPIKES = "10 ms, 2 % take 50"
_STEPS = "4 ms per 16"


def _cases() -> list[Case]:
    def add(trace: Arrivals, *costs: str, seeds: int = 4) -> None:
        cases.extend([Case(trace, COSTS[cost], seeds) for cost in costs])

    cases: list[Case] = []
    # Closed loops
    add(ClosedLoop("1 caller, thinks 3 ms", 1, equal(3 * _MS), seconds=8.0), _TEN, _TINY, seeds=1)
    add(ClosedLoop("1 caller, exponential 3 ms", 1, exponential(3 * _MS), seconds=8.0), _TEN, seeds=2)
    add(ClosedLoop("2 callers, think 3 ms", 2, equal(3 * _MS), seconds=8.0), _TEN, _CPU)
    add(ClosedLoop("2 callers, exponential 6 ms", 2, exponential(6 * _MS), seconds=20.0), _TEN)
    add(ClosedLoop("8 callers, think 0.1 ms", 8, equal(0.1 * _MS)), _TEN, _LINEAR, _GPU, _CPU, _TINY)
    add(ClosedLoop("8 callers, think 1 ms", 8, equal(1 * _MS)), _TEN, _CPU, _NOISY)
    add(
        ClosedLoop("8 callers, think 3 ms", 8, equal(3 * _MS)),
        _TEN,
        _LINEAR,
        _GPU,
        _CPU,
        _TINY,
        _NOISY,
        _SPIKES,
        _STEPS,
    )
    add(ClosedLoop("8 callers, think 6 ms", 8, equal(6 * _MS)), _TEN, _GPU, _CPU)
    exponential_8 = ClosedLoop("8 callers, exponential 3 ms", 8, exponential(3 * _MS), seconds=16.0)
    add(exponential_8, _TEN, _LINEAR, _GPU, _CPU, _TINY, _NOISY, _SPIKES, _STEPS)
    add(ClosedLoop("8 callers, exponential 10 ms", 8, exponential(10 * _MS), seconds=20.0), _TEN, _CPU)
    add(ClosedLoop("8 callers, 1 or 20 ms", 8, halves(1 * _MS, 20 * _MS), seconds=10.0), _TEN, _GPU, _CPU)
    add(ClosedLoop("8 callers, 0.5 or 100 ms", 8, halves(0.5 * _MS, 100 * _MS), seconds=10.0), _TEN, _CPU)
    add(ClosedLoop("8 callers, 0.25, 0.5, ... 32 ms", 8, ladder(0.25 * _MS, 2.0), seconds=10.0), _TEN, _GPU, _CPU)
    add(ClosedLoop("8 callers, lognormal 3 ms", 8, lognormal(3 * _MS, 1.0), seconds=16.0), _TEN, _GPU, _CPU, _NOISY)
    add(ClosedLoop("8 callers, Pareto 1.5 from 1 ms", 8, pareto(1 * _MS, 1.5), seconds=16.0), _TEN, _GPU, _CPU)
    late = ClosedLoop("8 callers, think 1 ms, 5 % 100 ms", 8, stragglers(1 * _MS, 100 * _MS, 0.05), seconds=20.0)
    add(late, _TEN, _GPU, _CPU, _NOISY)
    add(ClosedLoop("64 callers, think 3 ms", 64, equal(3 * _MS), seconds=5.0), _TEN, _GPU, _CPU, _STEPS, seeds=2)
    add(
        ClosedLoop("64 callers, exponential 3 ms", 64, exponential(3 * _MS), seconds=6.0),
        _TEN,
        _GPU,
        _CPU,
        _STEPS,
        seeds=2,
    )
    add(ClosedLoop("64 callers, lognormal 10 ms", 64, lognormal(10 * _MS, 1.0), seconds=6.0), _TEN, _GPU, seeds=2)
    add(ClosedLoop("256 callers, exponential 30 ms", 256, exponential(30 * _MS), seconds=3.0), _TEN, _GPU, seeds=2)
    add(
        ClosedLoop("1 000 callers, exponential 1 s", 1000, exponential(1.0), seconds=8.0, warm_up=2.0, spread=1.0),
        _TEN,
        _GPU,
        _CPU,
        seeds=2,
    )
    add(
        ClosedLoop("10 000 callers, exponential 2 s", 10000, exponential(2.0), seconds=4.0, warm_up=1.0, spread=2.0),
        _TEN,
        _GPU,
        seeds=1,
    )
    # Open loops
    for load, seconds in ((0.001, 100.0), (0.01, 40.0), (0.1, 8.0), (0.5, 4.0), (0.9, 4.0), (1.2, 3.0)):
        add(Poisson(f"Poisson, {100 * load:g} % of capacity", load=load, seconds=seconds), _TEN, seeds=2)
    for load, seconds in ((0.1, 20.0), (0.9, 4.0)):
        add(Poisson(f"Poisson, {100 * load:g} % of capacity", load=load, seconds=seconds), _GPU, _LINEAR, _CPU, seeds=2)
    add(Bursts("bursts of 8 at once, 10 per s", 10.0, 8, seconds=40.0), _TEN, _CPU, seeds=2)
    add(Bursts("bursts of 32 in 20 ms, 5 per s", 5.0, 32, 0.02, seconds=40.0), _TEN, _GPU, seeds=2)
    # Callers that come and go
    add(Turnover("8 come and go, 20 requests, 3 ms", 8, equal(3 * _MS), 20, 0.1, seconds=20.0), _TEN, _CPU)
    add(Turnover("8 come and go, 5 requests, exponential 3 ms", 8, exponential(3 * _MS), 5, 0.05, seconds=20.0), _TEN)
    add(
        ClosedLoop("8 callers, think 3 ms, 1 of 50 times 1 s", 8, pausing(3 * _MS, 1.0, 50), seconds=30.0, warm_up=2.0),
        _TEN,
        _GPU,
    )
    return cases


CASES = tuple(_cases())

DRAWN = (
    "1 caller, exponential 3 ms; 10 ms",
    "2 callers, exponential 6 ms; 10 ms",
    "8 callers, think 1 ms; 10 ms",
    "8 callers, think 3 ms; 10 ms",
    "8 callers, think 3 ms; 5 + 0.2 n ms",
    "8 callers, think 3 ms; 1 + n ms",
    "8 callers, think 6 ms; 10 ms",
    "8 callers, exponential 3 ms; 10 ms",
    "8 callers, 1 or 20 ms; 10 ms",
    "8 callers, 0.25, 0.5, ... 32 ms; 10 ms",
    "8 callers, lognormal 3 ms; 10 ms",
    "8 callers, Pareto 1.5 from 1 ms; 10 ms",
    "8 callers, think 1 ms, 5 % 100 ms; 10 ms",
    "8 come and go, 20 requests, 3 ms; 10 ms",
    "64 callers, exponential 3 ms; 10 ms",
    "1 000 callers, exponential 1 s; 10 ms",
    "Poisson, 1 % of capacity; 10 ms",
    "Poisson, 90 % of capacity; 10 ms",
)
"""Names of the cases that the plot shows."""
