"""Compare rules on all cases: each fixed rule with the parameters that suit the very case best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from aioinfer.batching import BatchLimits, BatchScheduler
from aioinfer.bench.simulation.bounds import latency_bound
from aioinfer.bench.simulation.cases import CASES, Case
from aioinfer.bench.simulation.clairvoyant import ReplayScheduler, search
from aioinfer.bench.simulation.rules import FixedScheduler, LinearModelScheduler
from aioinfer.bench.simulation.simulator import Result, Scheduler, simulate
from aioinfer.learned_rule import LearnedRule

__all__ = ["Comparison", "Figures", "NewScheduler", "compare", "compare_all", "ours", "run"]

SIMPLE = ("free", "full", "timer", "linear")
"""Leave when free, wait for full batches, a fixed timer, a learned linear model."""

NewScheduler: TypeAlias = Callable[[Case], Scheduler]

# So long that rules are compared, not the limit.
_BATCH_TIMEOUT = 1.0
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
_TIMERS = (0.0001, 0.0003, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01, 0.015, 0.02, 0.05)
# So many parameters, the best of the first seed, are tried with all seeds.
_FINALISTS = 3
# States that the clairvoyant's search keeps; with 16 times as many it finds schedules that are about 1 % better.
_WIDTH = 4


def ours(case: Case) -> Scheduler:
    """Return the scheduler of a server."""
    return BatchScheduler(BatchLimits(case.max_batch_size, 1, _BATCH_TIMEOUT), LearnedRule())


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over the seeds; see ``Result``."""

    latency: float
    p50: float
    p99: float
    throughput: float
    batch: float
    cold: float
    about: str = ""

    @classmethod
    def over(cls, results: Sequence[Result], about: str = "") -> Figures:
        def mean(values: list[float]) -> float:
            return math.fsum(values) / len(values)

        names = ("latency", "p50", "p99", "throughput", "batch", "cold")
        return cls(**{name: mean([getattr(result, name) for result in results]) for name in names}, about=about)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case, all rules.

    Attributes:
        case: its name.
        rules: figures by rule.
        first: mean latency by rule, with the first seed alone.
        clairvoyant: with the first seed, the least mean latency that was found by one who knows the future.
        bound: with the first seed, a mean latency that nobody can beat.
    """

    case: str
    rules: Mapping[str, Figures]
    first: Mapping[str, float]
    clairvoyant: float
    bound: float

    def clairvoyant_ratio(self, rule: str) -> float:
        """Mean latency, by that of the clairvoyant."""
        return self.first[rule] / self.clairvoyant

    def bound_ratio(self, rule: str) -> float:
        """Mean latency, by the bound."""
        return self.first[rule] / self.bound

    def latency_ratio(self, rule: str) -> float:
        """Mean latency, by that of the best simple rule."""
        return self.rules[rule].latency / min([self.rules[name].latency for name in SIMPLE])

    def throughput_ratio(self, rule: str) -> float:
        """Throughput, by that of the best simple rule."""
        return self.rules[rule].throughput / max([self.rules[name].throughput for name in SIMPLE])

    def as_good_as_simple(self, rule: str) -> bool:
        """Whether latency and throughput are at most 5 % worse than the best of the simple rules."""
        return self.latency_ratio(rule) <= 1.05 and self.throughput_ratio(rule) >= 1 / 1.05


def run(new: NewScheduler, case: Case, seeds: Sequence[int]) -> list[Result]:
    """Simulate a case with these seeds."""
    return [simulate(new(case), case.trace, case.cost, seed=seed, max_batch_size=case.max_batch_size) for seed in seeds]


def _linear(case: Case) -> Scheduler:
    return LinearModelScheduler(case.max_batch_size)


def _fixed(size: int, seconds: float) -> NewScheduler:
    return lambda case: FixedScheduler(size, seconds)


def best_fixed(case: Case, parameters: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], list[Result]]:
    """Return the parameters of least mean latency, and what they gave."""
    first = [
        (simulate(FixedScheduler(*p), case.trace, case.cost, max_batch_size=case.max_batch_size), p) for p in parameters
    ]
    first.sort(key=lambda one: one[0].latency)
    finals = []
    for result, parameter in first[:_FINALISTS]:
        results = [result, *run(_fixed(*parameter), case, range(1, case.seeds))]
        finals.append((math.fsum([one.latency for one in results]), parameter, results))
    _, parameter, results = min(finals, key=lambda one: one[0])
    return parameter, results


def compare(case: Case, rules: Mapping[str, NewScheduler]) -> Comparison:
    """Run one case."""
    seeds = range(case.seeds)
    most = case.max_batch_size if case.trace.callers is None else min(case.max_batch_size, case.trace.callers)
    sizes = [size for size in _SIZES if size < most] + [most]
    least, longest = case.cost.mean(1) / 100, 10 * case.cost.mean(most)
    timers = [timer for timer in _TIMERS if least <= timer <= longest]
    found = {"free": run(_fixed(1, 0.0), case, seeds)}
    abouts = {}
    (size, _), found["full"] = best_fixed(case, [(size, _BATCH_TIMEOUT) for size in sizes])
    abouts["full"] = f"{size}"
    (size, timer), found["timer"] = best_fixed(case, [(size, timer) for size in sizes for timer in timers])
    abouts["timer"] = f"{size}, {timer * 1000:g} ms"
    found["linear"] = run(_linear, case, seeds)
    for name, new in rules.items():
        found[name] = run(new, case, seeds)
    first = {name: results[0].latency for name, results in found.items()}
    clairvoyant = min(first.values())
    schedule = search(
        case.trace,
        case.cost,
        seed=0,
        max_batch_size=case.max_batch_size,
        latency=clairvoyant,
        width=_WIDTH,
    )
    clairvoyant = min(clairvoyant, run(lambda case: ReplayScheduler(schedule), case, [0])[0].latency)
    bound = latency_bound(case.trace, case.cost, seed=0, max_batch_size=case.max_batch_size)
    figures = {name: Figures.over(results, abouts.get(name, "")) for name, results in found.items()}
    return Comparison(case.name, figures, first, clairvoyant, bound)


def compare_all(
    names: Sequence[str], rules: Mapping[str, NewScheduler], *, processes: int | None = None
) -> Iterator[Comparison]:
    """Run the cases of these names, in so many processes; the rules must be functions of a module."""
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(partial(_compare_named, rules=rules), names)


def _compare_named(name: str, rules: Mapping[str, NewScheduler]) -> Comparison:
    return compare(next(case for case in CASES if case.name == name), rules)
