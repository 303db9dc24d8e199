"""The arithmetic of the benchmark, and what it reports."""

import json
import sys

import pytest

from aioinfer.bench import report
from aioinfer.bench.report import Entry, Spread, best_transport
from aioinfer.bench.workloads import Metric, System
from tests.bench.parts import ABOUT, alone, comparison, results

# -- arithmetic ----------------------------------------------------------------------------------------


def test_a_summary_is_the_median_and_the_spread() -> None:
    figures = comparison("tasks-tiny", aioinfer=[3.0, 1.0, 2.0, 10.0])
    assert figures.summary(System.OURS, "rate") == Spread(2.5, 1.0, 10.0)


def test_a_ratio_divides_medians_and_spreads_over_neighbouring_repeats() -> None:
    rates = comparison("tasks-tiny", aioinfer=[100.0, 90.0, 110.0], torchrl=[10.0, 5.0, 20.0])
    ratio = rates.ratio(rates.workload.metrics[0])
    assert ratio == Spread(10.0, 5.5, 18.0)


def test_a_crashed_repeat_is_left_out() -> None:
    rates = comparison("tasks-tiny", aioinfer=[100.0, None, 120.0], torchrl=[10.0, 5.0, None])
    assert rates.summary(System.OURS, "rate") == Spread(110.0, 100.0, 120.0)
    assert rates.ratio(rates.workload.metrics[0]) == Spread(110.0 / 7.5, 10.0, 10.0)


@pytest.mark.parametrize("theirs", [{}, {"torchrl": [None, None]}])
def test_without_the_other_system_there_is_no_ratio(theirs: dict[str, list[float | None]]) -> None:
    rates = comparison("tasks-tiny", aioinfer=[100.0, 100.0], **theirs)
    assert rates.ratio(rates.workload.metrics[0]) is None


def test_figures_of_one_measurement_have_the_median_of_their_ratios() -> None:
    slow, other = {"p50": 6.0, "memcpy": 3.0}, {"p50": 1.0, "memcpy": 0.25}
    times = alone("weights-420mb", slow, None, other, {"p50": 6.0, "memcpy": 2.0})
    assert times.ratio(times.workload.metrics[0]) == Spread(3.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("figure", "value", "verdict"),
    [
        ("rate", 12.0, "aim met"),
        ("rate", 11.99, "bar met"),
        ("rate", 7.99, "bar missed"),
        ("p50", 0.5, "aim met"),
        ("p50", 0.7, "bar met"),
        ("p50", 0.71, "bar missed"),
    ],
)
def test_a_verdict_reads_limits_as_at_least_for_rates_and_at_most_for_latencies(
    figure: str, value: float, verdict: str
) -> None:
    metric = Metric("rate", 8, 12) if figure == "rate" else Metric("p50", 0.7, 0.5)
    assert metric.verdict(value) == verdict


def test_the_better_transport_has_the_higher_rate_or_the_lower_latency() -> None:
    assert best_transport({"threading": {"rate": 2.0}, "slots": {"rate": 3.0}}, "rate") == "slots"
    assert best_transport({"threading": {"p50": 2.0}, "slots": {"p50": 3.0}}, "p50") == "threading"


# -- the report ----------------------------------------------------------------------------------------


def test_the_table_shows_figures_ratio_limits_and_verdict() -> None:
    shown = report.text(results(comparison("one-thread", aioinfer=[4e-4], torchrl=[1e-3])))
    row = next(line for line in shown.splitlines() if line.startswith("one-thread"))
    assert " ".join(row.split()) == "one-thread p50 0.400 ms torchrl 1.000 ms 0.40 0.40 to 0.40 <= 0.42 <= 0.3 bar met"


def test_the_table_shows_what_ours_is_compared_with_where_that_is_not_torchrl() -> None:
    copies = alone("weights-420mb", {"p50": 0.2, "p99": 0.3, "memcpy": 0.1, "count": 30})
    rates = alone("weights-publishing", {"rate": 90_000.0, "quiet rate": 100_000.0, "updates": 30})
    shown = [" ".join(line.split()) for line in report.text(results(copies, rates)).splitlines()]
    assert "weights-420mb p50 200.000 ms memcpy 100.000 ms 2.00 2.00 to 2.00 <= 3 <= 1.6 bar met" in shown
    assert ("weights-publishing rate 90,000/s quiet rate 100,000/s 0.90 0.90 to 0.90 >= 0.85 >= 0.97 bar met") in shown


def test_a_gap_is_reported_beside_the_gap_without_an_update() -> None:
    shown = report.text(results(alone("weights-gap-swap", {"gap": 0.002, "quiet gap": 0.0005, "memcpy": 0.02})))
    assert "weights-gap-swap: the longest gap in as long a time without an update is 0.500 ms" in shown


def test_beside_the_share_of_the_bare_forward_that_of_torchrl_is_shown() -> None:
    shown = report.text(results(comparison("tasks-big", aioinfer=[900.0], torchrl=[500.0], bare=[1000.0])))
    assert "0.90" in shown
    assert "tasks-big: torchrl's rate is 500/s, 0.50 of the bare model's" in shown


def test_without_torchrl_its_column_is_empty_and_ours_is_there() -> None:
    shown = report.text(results(comparison("tasks-tiny", aioinfer=[200_000.0])))
    row = next(line for line in shown.splitlines() if line.startswith("tasks-tiny"))
    assert row.split() == ["tasks-tiny", "rate", "200,000/s", "-", "-", "-", ">=", "10", ">=", "14", "-"]


def test_the_report_names_the_machine_the_bare_rates_and_the_crashes() -> None:
    shown = report.text(results(comparison("bare-mlp-1", bare=[17_000.0]), crashes=("tasks-mlp, heat, torchrl: gone",)))
    assert "Abacus 9, 2 cores" in shown
    assert "torchrl 0.14.1" in shown
    assert "bare forward, mlp, 1 row: 17,000 rows/s" in shown
    assert "CRASHED: tasks-mlp, heat, torchrl: gone" in shown


def test_callers_in_other_processes_are_reported_like_all_others() -> None:
    shown = report.text(results(comparison("processes-4", aioinfer=[18_000.0], torchrl=[4_000.0])))
    row = next(line for line in shown.splitlines() if line.startswith("processes-4"))
    assert " ".join(row.split()) == "processes-4 rate 18,000/s torchrl 4,000/s 4.50 4.50 to 4.50 >= 4 >= 6 bar met"
    assert "in other processes torchrl's clients block" in shown


def test_torchrl_with_stack_has_columns_and_bars_of_its_own() -> None:
    tiny = comparison("tasks-tiny", aioinfer=[110.0], torchrl=[10.0])
    fresh = comparison("tasks-tiny-fresh", aioinfer=[70.0], torchrl=[10.0])
    for each, rate in ((tiny, 20.0), (fresh, 35.0)):
        each.entries[System.STACK] = Entry("threading", repeats=[{"rate": rate}])
    slots = comparison("processes-4", aioinfer=[50.0], torchrl=[10.0])
    shown = [" ".join(line.split()) for line in report.text(results(tiny, fresh, slots)).splitlines()]
    limits = "11.0 11.0 to 11.0 >= 10 >= 14 bar met", "7.00 7.00 to 7.00 >= 6.5 >= 9 bar met"
    assert f"tasks-tiny rate 110/s torchrl 10/s {limits[0]} 5.50 (5.50 to 5.50) >= 6, missed" in shown
    assert f"tasks-tiny-fresh rate 70/s torchrl 10/s {limits[1]} 2.00 (2.00 to 2.00) -" in shown
    assert "processes-4 rate 50/s torchrl 10/s 5.00 5.00 to 5.00 >= 4 >= 6 bar met - -" in shown
    kept = json.loads(report.to_json(results(tiny)))["workloads"]["tasks-tiny"]["ratios"]
    assert kept[0]["over_stack"]["value"] == 5.5


def test_markdown_has_as_many_cells_in_every_row() -> None:
    shown = report.markdown(results(comparison("one-task", aioinfer=[4e-4], torchrl=[1e-3])))
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1


def test_json_keeps_every_repeat() -> None:
    kept = json.loads(report.to_json(results(comparison("one-task", aioinfer=[4e-4, 5e-4], torchrl=[1e-3, None]))))
    systems = kept["workloads"]["one-task"]["systems"]
    assert systems["aioinfer"]["repeats"] == [{"p50": 4e-4}, {"p50": 5e-4}]
    assert systems["torchrl"]["repeats"] == [{"p50": 1e-3}, None]
    assert kept["workloads"]["one-task"]["ratios"][0]["verdict"] == "bar met"
    assert kept["machine"] == ABOUT


def test_the_machine_is_described_without_importing_torchrl() -> None:
    before = set(sys.modules)  # another test may have imported it
    about = report.describe_machine()
    assert about["torch"] is not None
    assert isinstance(about["cores"], int)
    assert "torchrl" not in set(sys.modules) - before
