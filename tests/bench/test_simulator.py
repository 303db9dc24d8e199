"""The simulation of rules for batches, and the rule of a server in it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from aioinfer.bench.simulation.bounds import latency_bound, size_bound
from aioinfer.bench.simulation.cases import CASES, DRAWN, Case
from aioinfer.bench.simulation.clairvoyant import ReplayScheduler, search
from aioinfer.bench.simulation.comparison import NewScheduler, compare, ours, run
from aioinfer.bench.simulation.costs import COSTS
from aioinfer.bench.simulation.rules import FixedScheduler, LinearModelScheduler
from aioinfer.bench.simulation.simulator import Result, simulate
from aioinfer.cli import main

CASE = {case.name: case for case in CASES}
SEVERAL = [
    CASE["8 callers, exponential 3 ms; 10 ms ± 30 %"],
    CASE["8 come and go, 5 requests, exponential 3 ms; 10 ms"],
    CASE["Poisson, 120 % of capacity; 10 ms"],
]


def fixed(size: int, seconds: float) -> NewScheduler:
    return lambda case: FixedScheduler(size, seconds)


def clairvoyant(case: Case, latency: float) -> Result:
    rows = search(case.trace, case.cost, seed=0, max_batch_size=case.max_batch_size, latency=latency, width=2)
    return simulate(ReplayScheduler(rows), case.trace, case.cost)


def name(case: Case) -> str:
    return case.name


def test_the_names_of_the_cases_differ_and_those_that_are_drawn_exist() -> None:
    assert len(CASE) == len(CASES)
    assert CASE.keys() > set(DRAWN)


# -- the simulator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SEVERAL, ids=name)
@pytest.mark.parametrize("new", [ours, fixed(8, 0.02), lambda case: LinearModelScheduler()])
def test_a_run_can_be_repeated_and_answers_each_request_once(case: Case, new: NewScheduler) -> None:
    result = run(new, case, [1])
    assert result[0].unfinished == 0
    assert result == run(new, case, [1])


def test_full_batches_of_equal_callers_take_one_pass_each() -> None:
    case = CASE["8 callers, think 3 ms; 10 ms"]
    result = simulate(FixedScheduler(8, 1.0), case.trace, case.cost)
    assert result.latency == pytest.approx(0.01)
    assert result.batch == pytest.approx(8, rel=0.02)
    assert result.throughput == pytest.approx(8 / 0.013, rel=0.01)


def test_a_timer_adds_its_time_to_the_latency_of_a_lone_caller() -> None:
    case = CASE["1 caller, thinks 3 ms; 10 ms"]
    assert simulate(FixedScheduler(2, 0.004), case.trace, case.cost).p50 == pytest.approx(0.014)


def test_the_way_of_requests_and_replies_counts() -> None:
    case = CASE["1 caller, thinks 3 ms; 10 ms"]
    result = simulate(FixedScheduler(1, 0.0), case.trace, case.cost, transport=0.001)
    assert result.latency == pytest.approx(0.012)
    assert result.throughput == pytest.approx(1 / 0.015, rel=0.01)


def test_a_pass_has_at_most_so_many_rows() -> None:
    case = CASE["64 callers, think 3 ms; 10 ms"]
    result = simulate(FixedScheduler(16, 1.0), case.trace, case.cost, max_batch_size=16)
    assert result.batch == 16
    assert result.throughput == pytest.approx(1600, rel=0.01)


# -- the bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SEVERAL[1], CASE["8 callers, 1 or 20 ms; 1 + n ms"], SEVERAL[2]], ids=name)
def test_nobody_beats_the_bound(case: Case) -> None:
    bound = latency_bound(case.trace, case.cost, seed=0, max_batch_size=case.max_batch_size)
    assert bound <= clairvoyant(case, run(fixed(1, 0.0), case, [0])[0].latency).latency


def test_a_clairvoyant_beats_the_best_size() -> None:
    case = CASE["2 callers, exponential 6 ms; 10 ms"]
    best = run(fixed(2, 1.0), case, [0])[0].latency
    assert clairvoyant(case, best).latency < 0.9 * best


def test_the_bound_of_a_closed_loop_is_what_equal_callers_can_reach() -> None:
    assert size_bound([0.003] * 8, COSTS["10 ms"], 64) == pytest.approx(0.01)
    # The model can do no more than eight rows in 8 ms, of which the callers think for 1.
    assert size_bound([0.001] * 8, COSTS["n ms"], 8) == pytest.approx(0.007)


# -- the rule of a server -----------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["10 ms", "0.2 + 0.005 n ms"])
def test_a_lone_caller_is_never_held(cost: str) -> None:
    case = CASE[f"1 caller, thinks 3 ms; {cost}"]
    result = simulate(ours(case), case.trace, case.cost)
    assert result.latency == pytest.approx(case.cost.mean(1))
    assert result.p99 == pytest.approx(case.cost.mean(1))


@pytest.mark.parametrize(
    ("case", "size", "seconds"),  # those of the best simple rule
    [
        ("8 callers, think 1 ms; 10 ms", 8, 1.0),
        ("8 callers, think 3 ms; 10 ms", 8, 1.0),
        ("8 callers, think 3 ms; 1 + n ms", 1, 0.0),
        ("8 callers, exponential 3 ms; 10 ms", 7, 0.02),
        ("8 callers, 1 or 20 ms; 10 ms", 5, 0.02),
        ("8 callers, 0.25, 0.5, ... 32 ms; 10 ms", 6, 0.015),
        ("8 come and go, 20 requests, 3 ms; 10 ms", 4, 0.015),
        ("Poisson, 1 % of capacity; 10 ms", 1, 0.0),
        ("bursts of 8 at once, 10 per s; 1 + n ms", 1, 0.0),
    ],
)
def test_the_rule_of_a_server_is_nearly_as_good_as_the_best_simple_one(case: str, size: int, seconds: float) -> None:
    (learned,), (best,) = run(ours, CASE[case], [0]), run(fixed(size, seconds), CASE[case], [0])
    assert learned.latency <= 1.05 * best.latency
    assert learned.throughput >= best.throughput / 1.05


# -- the command --------------------------------------------------------------------------------------


def test_a_comparison_tunes_the_simple_rules() -> None:
    comparison = compare(CASE["2 callers, think 3 ms; 10 ms"], {"ours": ours})
    assert comparison.rules["full"].about == "2"
    assert comparison.rules["full"].latency == pytest.approx(0.01)
    assert comparison.rules["free"].latency == pytest.approx(0.017)
    assert comparison.clairvoyant == pytest.approx(0.01)
    assert comparison.bound == pytest.approx(0.01)
    assert comparison.as_good_as_simple("ours")


def test_the_command_prints_a_table_and_writes_it_and_a_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, drawing = tmp_path / "table.md", tmp_path / "drawing.svg"
    table.write_text(
        "Before.\n\n<!-- aioinfer simulate -->\nold\n<!-- end of aioinfer simulate -->\n\nAfter.\n", encoding="utf-8"
    )
    only = "^1 caller, exponential 3 ms"
    assert main(["simulate", "--only", only, "--processes", "1", "--markdown", str(table), "--plot", str(drawing)]) == 0
    assert "PASS" in capsys.readouterr().out
    text = table.read_text(encoding="utf-8")
    assert "| 1 caller, exponential 3 ms | 10 ms | 10.00 |" in text
    assert text.startswith("Before.\n\n<!-- aioinfer simulate -->\n\n| callers")
    assert text.endswith(".\n\n<!-- end of aioinfer simulate -->\n\nAfter.\n")
    assert "old" not in text
    assert ElementTree.fromstring(drawing.read_text(encoding="utf-8")).findtext("{http://www.w3.org/2000/svg}title")
