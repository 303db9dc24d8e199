"""The simulation of rules for batches, and the rule of a server in it."""

from __future__ import annotations

import pytest

from aioinfer.bench.simulation.cases import CASES
from aioinfer.bench.simulation.comparison import ours
from aioinfer.bench.simulation.rules import FixedScheduler
from aioinfer.bench.simulation.simulator import simulate

CASE = {case.name: case for case in CASES}


def test_the_names_of_the_cases_differ() -> None:
    assert len(CASE) == len(CASES)


@pytest.mark.parametrize(
    "name",
    [
        "8 callers, exponential 3 ms; 10 ms ± 30 %",
        "8 come and go, 5 requests, exponential 3 ms; 10 ms",
        "Poisson, 120 % of capacity; 10 ms",
    ],
)
def test_a_run_can_be_repeated_and_answers_each_request_once(name: str) -> None:
    case = CASE[name]
    result = simulate(ours(case), case.trace, case.cost, seed=1)
    assert result.unfinished == 0
    assert result == simulate(ours(case), case.trace, case.cost, seed=1)


def test_a_lone_caller_is_never_held() -> None:
    case = CASE["1 caller, exponential 3 ms; 10 ms"]
    assert simulate(ours(case), case.trace, case.cost).latency == pytest.approx(0.01)


def test_full_batches_of_equal_callers_take_one_pass_each() -> None:
    case = CASE["8 callers, think 3 ms; 10 ms"]
    result = simulate(FixedScheduler(8, 1.0), case.trace, case.cost)
    assert result.latency == pytest.approx(0.01)
    assert result.throughput == pytest.approx(8 / 0.013, rel=0.01)
