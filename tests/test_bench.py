import argparse
import asyncio
import gc
import json
import os
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aioinfer import bench
from aioinfer.bench import contenders, drivers, machine, measure, report, runner, trainers, weights
from aioinfer.bench.models import Policy
from aioinfer.bench.partners import Partner, Pipe
from aioinfer.bench.results import Contest, Entry, Figures, Ratio, Results, Summary, better
from aioinfer.bench.workloads import WORKLOADS, Job, Metric, Pattern, System, WeightSet, Workload

BY_NAME = {workload.name: workload for workload in WORKLOADS}
ABOUT: dict[str, str | int | None] = {
    "cpu": "Abacus 9",
    "cores": 2,
    "system": "Linux",
    "python": "3.11.7",
    "aioinfer": "0.1.0",
    "torch": "2.13.0",
    "tensordict": "0.14.3",
    "torchrl": "0.14.1",
    "load": "0.1",
    "date": "2026-11-01T00:00:00+00:00",
}


def contest(name: str, **repeats: list[float | None]) -> Contest:
    workload = BY_NAME[name]
    figure = workload.metrics[0].figure if workload.metrics else "rate"
    made: dict[System, Entry] = {}
    for system, values in repeats.items():
        figures: list[Figures | None] = [None if value is None else {figure: value} for value in values]
        made[System(system)] = Entry("threading", repeats=figures)
    return Contest(workload, made)


def alone(name: str, *repeats: Figures | None) -> Contest:
    """A workload on which our figure is compared with another one of ours."""
    return Contest(BY_NAME[name], {System.OURS: Entry("queues", repeats=list(repeats))})


def results(*contests: Contest, crashes: tuple[str, ...] = ()) -> Results:
    return Results(ABOUT, 1.5, 3, "default", list(contests), list(crashes))


def job(workload: str, system: System = System.OURS, way: str = "threading", seconds: float = 0.05) -> Job:
    return Job(workload, system, way, warm_up=0.01, seconds=seconds, seed=1)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


# -- what is measured ----------------------------------------------------------------------------------


def test_every_bar_is_easier_than_its_aim() -> None:
    for workload in WORKLOADS:
        for metric in workload.metrics:
            assert (metric.bar < metric.aim) is metric.higher_is_better, workload.name


def test_the_bare_model_takes_part_only_where_something_is_compared_with_it() -> None:
    with_bare = {workload.name for workload in WORKLOADS if workload.ways(System.BARE)}
    assert with_bare == {"tasks-big", "bare-tiny-64", "bare-mlp-64", "bare-big-64", "bare-mlp-1"}
    assert BY_NAME["bare-mlp-1"].ways(System.OURS) == ()


def test_torchrl_gets_no_slots_where_they_would_need_ten_thousand_threads() -> None:
    assert BY_NAME["tasks-10k"].ways(System.TORCHRL) == ("threading",)
    assert BY_NAME["tasks-tiny"].ways(System.TORCHRL) == ("threading", "slots")


def test_who_takes_part_in_a_workload_is_whom_its_ratios_need() -> None:
    for workload in WORKLOADS:
        compared = {metric.against for metric in workload.metrics} - {System.BARE}
        assert not workload.metrics or bool(workload.ways(System.OURS)), workload.name
        assert System.TORCHRL not in compared or workload.ways(System.TORCHRL), workload.name
    assert BY_NAME["weights-1mb-8"].ways(System.TORCHRL) == ("queues",)
    assert BY_NAME["weights-420mb"].ways(System.TORCHRL) == ()


@pytest.mark.parametrize("name", ["weights-1mb-8", "weights-1mb-200", "weights-publishing"])
def test_a_published_model_has_the_size_that_its_workload_names(name: str) -> None:
    workload = BY_NAME[name]
    assert workload.weights is not None
    policy = Policy(workload.model, workload.weights)
    parameters = list(policy.module.parameters())
    assert len(parameters) == workload.weights.tensors
    assert sum(parameter.nbytes for parameter in parameters) == workload.weights.nbytes
    policy.check(policy.module(policy.request()))


# -- arithmetic ----------------------------------------------------------------------------------------


def test_a_summary_is_the_median_and_the_spread() -> None:
    assert Summary.of([3.0, 1.0, 2.0, 10.0]) == Summary(2.5, 1.0, 10.0)


def test_a_ratio_divides_medians_and_spreads_over_neighbouring_repeats() -> None:
    rates = contest("tasks-tiny", aioinfer=[100.0, 90.0, 110.0], torchrl=[10.0, 5.0, 20.0])
    ratio = rates.ratio(rates.workload.metrics[0])
    assert ratio == Ratio(10.0, 5.5, 18.0)


def test_a_crashed_repeat_is_left_out() -> None:
    rates = contest("tasks-tiny", aioinfer=[100.0, None, 120.0], torchrl=[10.0, 5.0, None])
    assert rates.summary(System.OURS, "rate") == Summary(110.0, 100.0, 120.0)
    assert rates.ratio(rates.workload.metrics[0]) == Ratio(110.0 / 7.5, 10.0, 10.0)


@pytest.mark.parametrize("theirs", [{}, {"torchrl": [None, None]}])
def test_without_the_other_system_there_is_no_ratio(theirs: dict[str, list[float | None]]) -> None:
    rates = contest("tasks-tiny", aioinfer=[100.0, 100.0], **theirs)
    assert rates.ratio(rates.workload.metrics[0]) is None


def test_a_figure_can_be_divided_by_another_one_of_the_same_repeats() -> None:
    times = alone("weights-420mb", {"p50": 0.2, "memcpy": 0.1}, None, {"p50": 0.4, "memcpy": 0.1})
    assert times.ratio(times.workload.metrics[0]) == Ratio(pytest.approx(3.0), 2.0, 4.0)  # type: ignore[arg-type]


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
    assert Ratio(value, value, value).verdict(metric) == verdict


def test_the_better_transport_has_the_higher_rate_or_the_lower_latency() -> None:
    assert better({"threading": {"rate": 2.0}, "slots": {"rate": 3.0}}, "rate") == "slots"
    assert better({"threading": {"p50": 2.0}, "slots": {"p50": 3.0}}, "p50") == "threading"


# -- the report ----------------------------------------------------------------------------------------


def test_the_table_shows_figures_ratio_limits_and_verdict() -> None:
    shown = report.text(results(contest("one-thread", aioinfer=[4e-4], torchrl=[1e-3])))
    row = next(line for line in shown.splitlines() if line.startswith("one-thread"))
    assert " ".join(row.split()) == "one-thread p50 0.400 ms torchrl 1.000 ms 0.40 0.40 to 0.40 <= 0.7 <= 0.5 aim met"


def test_the_table_shows_what_ours_is_compared_with_where_that_is_not_torchrl() -> None:
    copies = alone("weights-420mb", {"p50": 0.2, "p99": 0.3, "memcpy": 0.1, "count": 30})
    rates = alone("weights-publishing", {"rate": 90_000.0, "quiet rate": 100_000.0, "updates": 30})
    shown = [" ".join(line.split()) for line in report.text(results(copies, rates)).splitlines()]
    assert "weights-420mb p50 200.000 ms memcpy 100.000 ms 2.00 2.00 to 2.00 <= 3 <= 1.6 bar met" in shown
    assert ("weights-publishing rate 90,000/s quiet rate 100,000/s 0.90 0.90 to 0.90 >= 0.85 >= 0.97 bar met") in shown


def test_a_gap_is_reported_beside_the_gap_without_an_update() -> None:
    shown = report.text(results(alone("weights-gap-swap", {"gap": 0.002, "quiet gap": 0.0005, "memcpy": 0.02})))
    assert "weights-gap-swap: the longest gap in as long a time without an update is 0.500 ms" in shown


def test_the_share_of_the_bare_forward_also_shows_that_of_torchrl() -> None:
    shown = report.text(results(contest("tasks-big", aioinfer=[900.0], torchrl=[500.0], bare=[1000.0])))
    assert "0.90" in shown
    assert "torchrl's share is 0.50" in shown


def test_without_torchrl_its_column_is_empty_and_ours_is_there() -> None:
    shown = report.text(results(contest("tasks-tiny", aioinfer=[200_000.0])))
    row = next(line for line in shown.splitlines() if line.startswith("tasks-tiny"))
    assert row.split() == ["tasks-tiny", "rate", "200,000/s", "-", "-", "-", ">=", "8", ">=", "12", "-"]


def test_the_report_names_the_machine_the_bare_rates_and_the_crashes() -> None:
    shown = report.text(results(contest("bare-mlp-1", bare=[17_000.0]), crashes=("tasks-mlp, heat, torchrl: gone",)))
    assert "Abacus 9, 2 cores" in shown
    assert "torchrl 0.14.1" in shown
    assert "bare forward, mlp, 1 row: 17,000 rows/s" in shown
    assert "CRASHED: tasks-mlp, heat, torchrl: gone" in shown


def test_markdown_has_as_many_cells_in_every_row() -> None:
    shown = report.markdown(results(contest("one-task", aioinfer=[4e-4], torchrl=[1e-3])))
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1


def test_json_keeps_every_repeat() -> None:
    kept = json.loads(report.to_json(results(contest("one-task", aioinfer=[4e-4, 5e-4], torchrl=[1e-3, None]))))
    systems = kept["workloads"]["one-task"]["systems"]
    assert systems["aioinfer"]["repeats"] == [{"p50": 4e-4}, {"p50": 5e-4}]
    assert systems["torchrl"]["repeats"] == [{"p50": 1e-3}, None]
    assert kept["workloads"]["one-task"]["ratios"][0]["verdict"] == "aim met"
    assert kept["machine"] == ABOUT


def test_the_machine_is_described_without_importing_torchrl() -> None:
    about = machine.describe()
    assert about["torch"] is not None
    assert isinstance(about["cores"], int)
    assert "torchrl" not in sys.modules


# -- the loads -----------------------------------------------------------------------------------------


def test_an_open_loop_has_the_same_schedule_for_the_same_seed() -> None:
    schedule = drivers.arrivals(4000.0, 2.0, seed=3)
    assert schedule == drivers.arrivals(4000.0, 2.0, seed=3) != drivers.arrivals(4000.0, 2.0, seed=4)
    assert schedule == sorted(schedule)
    assert 0 < schedule[0] < schedule[-1] < 2.0
    assert len(schedule) == pytest.approx(8000, rel=0.1)


async def test_an_open_loop_answers_every_request_and_leaves_the_warm_up_out() -> None:
    submitted = []

    def submit(request: object) -> asyncio.Future[object]:
        submitted.append(request)
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, request)
        return future

    caller = contenders.TaskCaller(submit, submit)
    latencies = await drivers.open_loop(caller, "td", [0.0, 0.001, 0.002, 0.003], warm_up=0.002)
    assert len(submitted) == 4
    assert len(latencies) == 2


def test_an_error_of_a_thread_reaches_the_measurement() -> None:
    def fail(_: object) -> None:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError, match="refused"):
        drivers.threads([fail], [None], 0.0, 0.0)


async def test_an_error_of_a_task_reaches_the_measurement() -> None:
    def fail(_: object) -> asyncio.Future[object]:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError, match="refused"):
        await drivers.tasks([contenders.TaskCaller(fail, fail)], [None], 0.0, 10.0)


def test_acts_that_take_turns_are_timed_apart_without_the_warm_up() -> None:
    acts: list[str] = []
    times = drivers.by_turns({"send": lambda: acts.append("send"), "copy": lambda: acts.append("copy")}, 0.0, 0.0)
    assert acts == ["send", "copy"] * 2
    assert {name: len(taken) for name, taken in times.items()} == {"send": 1, "copy": 1}


@pytest.mark.parametrize(
    ("begun", "ended", "gap"), [(1.5, 2.5, 1.0), (3.5, 3.6, 3.0), (6.5, 9.0, 2.0), (0.0, 99.0, 3.0)]
)
def test_the_longest_gap_lies_at_least_partly_inside_the_update(begun: float, ended: float, gap: float) -> None:
    assert drivers.longest_gap([1.0, 2.0, 3.0, 6.0, 7.0, 9.0], begun, ended) == gap


async def test_gaps_are_measured_with_and_without_an_update() -> None:
    passes = [0.0]  # of an earlier round

    async def call(request: object) -> None:
        await asyncio.sleep(0)
        passes.append(time.perf_counter())

    async def update() -> tuple[float, float]:
        begun = time.perf_counter()
        await asyncio.sleep(0.01)
        return begun, time.perf_counter()

    caller = contenders.TaskCaller(call, call)  # type: ignore[arg-type]
    started = time.perf_counter()
    with_one, without = await drivers.gaps([caller], [None], passes, update)
    assert 0 < with_one < time.perf_counter() - started
    assert 0 < without < time.perf_counter() - started


def test_a_reply_that_is_none_is_not_measured() -> None:
    policy = Policy("tiny")
    with pytest.raises(RuntimeError, match=r"shape \[3, 2\], expected \[2\]"):
        policy.check(policy.module(policy.request(3)))


@pytest.mark.parametrize("way", ["threading", "slots"])
@pytest.mark.parametrize("name", ["tasks-tiny", "threads-tiny", "one-thread", "one-task"])
def test_ours_is_measured_on_every_transport(name: str, way: str) -> None:
    figures = measure.measure(job(name, way=way))
    assert figures[BY_NAME[name].metrics[0].figure] > 0


def test_ours_and_the_bare_model_are_measured_where_there_is_one_way() -> None:
    assert set(measure.measure(job("open-loop"))) == {"p50", "p99", "count"}
    assert measure.measure(job("bare-tiny-64", System.BARE, "none"))["rate"] > 0


# -- with a trainer ------------------------------------------------------------------------------------


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [
        workload if workload.weights is None else replace(workload, weights=WeightSet(1_000_000, 50))
        for workload in WORKLOADS
    ]
    monkeypatch.setattr(measure, "WORKLOADS", small)


@pytest.mark.parametrize(
    ("name", "way", "figures"),
    [
        ("weights-420mb", "queues", {"p50", "p99", "count", "memcpy"}),
        ("weights-420mb-shared", "shared memory", {"p50", "p99", "count", "memcpy"}),
        ("weights-publishing", "queues", {"rate", "quiet rate", "updates"}),
        ("weights-gap-swap", "queues", {"gap", "quiet gap", "memcpy", "count"}),
    ],
)
def test_weights_are_measured_between_two_processes(
    monkeypatch: pytest.MonkeyPatch, name: str, way: str, figures: set[str]
) -> None:
    shrink(monkeypatch)
    found = measure.measure(job(name, way=way, seconds=0.2))
    assert set(found) == figures
    assert min(found.values()) > 0
    assert gc.get_freeze_count() == 0


def test_a_server_that_does_not_serve_what_was_sent_is_not_measured() -> None:
    class Stale:
        def ask(self, observation: list[float]) -> list[float]:
            return [0.0, 0.0]

    with pytest.raises(RuntimeError, match=r"the server answered \[0.0, 0.0\] after send\(\), the model "):
        trainers._check(Policy("tiny"), lambda: None, Stale())  # type: ignore[arg-type]


def test_a_trainer_that_falls_behind_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> "Idle":
            return self

        def __exit__(self, *_: object) -> None: ...

        def tell(self, message: str) -> None: ...

        def answer(self) -> int:
            return 0

    shrink(monkeypatch)
    monkeypatch.setattr(weights, "Partner", Idle)
    with pytest.raises(RuntimeError, match=r"0\.0 updates/s were published instead of 10"):
        measure.measure(job("weights-publishing", way="queues"))


def fail(pipe: Pipe) -> None:
    raise ConnectionError("refused")


def die(pipe: Pipe) -> None:
    os._exit(3)


def test_what_goes_wrong_in_the_other_process_is_told_in_this_one() -> None:
    with pytest.raises(RuntimeError, match=r"the other process failed: ConnectionError: refused"):
        Partner(fail)
    with pytest.raises(RuntimeError, match="the other process died"):
        Partner(die)


@pytest.mark.skipif(find_spec("torchrl") is None, reason="torchrl is not installed")
def test_weights_of_torchrl_are_measured_too() -> None:
    (outcome,) = runner.measure_in_turn([job("weights-1mb-8", System.TORCHRL, "queues")])
    assert not isinstance(outcome, runner.MeasurementError), str(outcome)
    assert outcome["p50"] > 0


@pytest.mark.skipif(find_spec("torchrl") is None, reason="torchrl is not installed")
def test_torchrl_is_measured_in_a_process_of_its_own() -> None:
    jobs = [job("tasks-tiny", System.TORCHRL, way) for way in ("threading", "slots")]
    for outcome in runner.measure_in_turn([*jobs, job("threads-tiny", System.TORCHRL, "slots")]):
        assert not isinstance(outcome, runner.MeasurementError)
        assert outcome["rate"] > 0


# -- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--repeats", "0"], ["--seconds", "0"], ["--seconds", "nan"], ["--only", "nothing"]]
)
def test_senseless_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        options(*arguments)


def test_one_workload_can_be_measured_without_torchrl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "describe", lambda: {**ABOUT, "torchrl": None})
    kept = tmp_path / "figures.json"
    assert bench.run(options("--only", "one-task", "--seconds", "0.1", "--repeats", "1", "--json", str(kept))) == 0
    systems = json.loads(kept.read_text())["workloads"]["one-task"]["systems"]
    assert list(systems) == ["aioinfer"]
    assert set(systems["aioinfer"]["heats"]) == {"threading", "slots"}
    assert systems["aioinfer"]["repeats"][0]["p50"] > 0
    assert "one-task" in capsys.readouterr().out


def test_a_crashed_measurement_is_named_and_the_others_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_in_turn(jobs: list[Job]) -> list[Figures | runner.MeasurementError]:
        return [
            runner.MeasurementError("exit status 1, gone")
            if job.system == System.TORCHRL
            else {"rate": 1.0, "p50": 1.0, "p99": 2.0}
            for job in jobs
        ]

    monkeypatch.setattr(machine, "describe", lambda: ABOUT)
    monkeypatch.setattr(runner, "measure_in_turn", measure_in_turn)
    assert bench.run(options("--only", "tasks-10k", "--only", "one-task", "--repeats", "1")) == 1
    shown = capsys.readouterr().out
    assert "CRASHED: [1/2] tasks-10k, repeat 1/1, torchrl (threading): exit status 1, gone" in shown
    assert "1/s" in shown


def test_a_measurement_that_dies_is_reported_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_MODULE", "json.nothing")
    (outcome,) = runner.measure_in_turn([job("one-task")])
    assert isinstance(outcome, runner.MeasurementError)
    assert str(outcome).startswith("exit status 1, ")
    assert "No module named json.nothing" in str(outcome)


def test_a_measurement_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_IMPORT_LIMIT", 0.01)
    (outcome,) = runner.measure_in_turn([job("one-task")])
    assert str(outcome) == "hung and was killed"


def test_interleaved_jobs_share_the_seed_and_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[list[Job]] = []

    def measure_in_turn(jobs: list[Job]) -> list[Figures]:
        rounds.append(jobs)
        return [{"p50": 1.0, "p99": 2.0} for _ in jobs]

    monkeypatch.setattr(runner, "measure_in_turn", measure_in_turn)
    workload = Workload("w", "", Pattern.OPEN_LOOP, "mlp", 1, (Metric("p50", 0.6, 0.3),), ("a",), ("b",))
    runner.Runner(Results(ABOUT, 1.5, 2, "default"), torchrl=True).measure(workload, "w")
    assert [[job.way for job in jobs] for jobs in rounds] == [["a", "b"], ["a", "b"]]
    assert [{(job.seed, job.seconds, job.warm_up) for job in jobs} for jobs in rounds] == [
        {(1, 1.5, 0.4)},
        {(2, 1.5, 0.4)},
    ]
