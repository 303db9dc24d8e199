"""What `aioinfer bench` measures, and how the command ends."""

import json
from pathlib import Path

import pytest

from aioinfer import bench
from aioinfer.bench import report, runner
from aioinfer.bench.models import Policy
from aioinfer.bench.report import Figures, Results
from aioinfer.bench.workloads import WORKLOADS, Job, Metric, Pattern, RequestKind, System, Workload
from tests.bench.parts import ABOUT, BY_NAME, job, options

# -- what is measured ----------------------------------------------------------------------------------


def test_every_bar_is_easier_than_its_aim() -> None:
    for workload in WORKLOADS:
        for metric in workload.metrics:
            assert (metric.bar < metric.aim) is metric.higher_is_better, workload.name


def test_the_bare_model_takes_part_only_where_something_is_compared_with_it() -> None:
    with_bare = {workload.name for workload in WORKLOADS if workload.ways(System.BARE)}
    slow = {workload.name for workload in WORKLOADS if workload.model == "slow"}
    bare = {"bare-tiny-64", "bare-mlp-64", "bare-big-64", "bare-cnn-32", "bare-mlp-1"}
    assert with_bare == {*slow, *bare, "tasks-big"}
    assert slow > {"slow-tasks-8", "slow-processes-8"}
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


@pytest.mark.parametrize(
    ("collate", "tasks", "processes"),
    [
        (None, ["aioinfer"], ["aioinfer"]),
        ("default", ["aioinfer", "torchrl"], ["aioinfer", "torchrl"]),
        ("stack", ["aioinfer", "torchrl-stack"], ["aioinfer", "torchrl"]),
        ("both", ["aioinfer", "torchrl", "torchrl-stack"], ["aioinfer", "torchrl"]),
    ],
)
def test_torchrl_takes_part_with_each_chosen_way_to_stack_requests_where_its_server_stacks_them(
    collate: str | None, tasks: list[str], processes: list[str]
) -> None:
    assert BY_NAME["tasks-tiny-fresh"].systems(collate) == tasks
    assert BY_NAME["processes-8"].systems(collate) == processes
    assert System.STACK not in BY_NAME["weights-1mb-8"].systems(collate)
    assert BY_NAME["threads-tiny-named"].systems(collate) == ["aioinfer"]


def test_kinds_of_requests_take_turns_early_and_late_and_each_has_a_rate() -> None:
    workload = BY_NAME["processes-8-named"]
    assert workload.turns == ("array", "tensor", "reused", "reused", "tensor", "array") * 2
    assert {metric.figure for metric in workload.metrics} == {"array rate", "tensor rate"}
    assert {metric.divisor for metric in workload.metrics} == {workload.rate_figure(RequestKind.REUSED)}
    assert BY_NAME["tasks-tiny-fresh"].turns == ("fresh",)
    assert BY_NAME["tasks-tiny-fresh"].rate_figure(RequestKind.FRESH) == "rate"


def test_the_processes_of_a_workload_have_as_many_callers_each() -> None:
    for workload in WORKLOADS:
        assert not workload.processes or workload.callers % workload.processes == 0, workload.name
    assert BY_NAME["processes-2x16"].callers == 32


@pytest.mark.parametrize(
    ("name", "one_thread"),
    [("tasks-mlp", False), ("process-one", True), ("weights-1mb-8", True), ("rows-1024", True)],
)
def test_a_measurement_beside_other_processes_or_of_large_batches_has_one_thread(name: str, one_thread: bool) -> None:
    assert BY_NAME[name].one_thread is one_thread


def test_requests_of_several_rows_fit_into_a_batch() -> None:
    for workload in WORKLOADS:
        assert workload.rows <= workload.max_batch_size, workload.name
    assert BY_NAME["rows-1024"].batch_size == (1024,)
    assert BY_NAME["one-thread"].batch_size == ()


@pytest.mark.parametrize("name", ["weights-1mb-8", "weights-1mb-200", "weights-publishing"])
def test_a_published_model_has_the_size_that_its_workload_names(name: str) -> None:
    workload = BY_NAME[name]
    assert workload.weights is not None
    policy = Policy(workload.model, workload.weights)
    parameters = list(policy.module.parameters())
    assert len(parameters) == workload.weights.tensors
    assert sum(parameter.nbytes for parameter in parameters) == workload.weights.nbytes
    policy.check(policy.module(policy.request()))


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
    monkeypatch.setattr(report, "describe_machine", lambda: {**ABOUT, "torchrl": None})
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

    monkeypatch.setattr(report, "describe_machine", lambda: ABOUT)
    monkeypatch.setattr(runner, "measure_in_turn", measure_in_turn)
    assert bench.run(options("--only", "tasks-10k", "--only", "one-task", "--repeats", "1")) == 1
    shown = capsys.readouterr().out
    assert "CRASHED: [1/2] tasks-10k, repeat 1/1, torchrl (threading): exit status 1, gone" in shown
    assert "1/s" in shown


def test_a_measurement_that_dies_is_reported_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MODULE", "json.nothing")
    (outcome,) = runner.measure_in_turn([job("one-task")])
    assert isinstance(outcome, runner.MeasurementError)
    assert str(outcome).startswith("exit status 1, ")
    assert "No module named json.nothing" in str(outcome)


def test_a_measurement_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "MODULE", "hanging")
    monkeypatch.setattr(runner, "IMPORT_LIMIT", 0.01)
    (outcome,) = runner.measure_in_turn([job("one-task")])
    assert str(outcome) == "hung and was killed"


def test_interleaved_jobs_share_the_seed_and_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[list[Job]] = []

    def measure_in_turn(jobs: list[Job]) -> list[Figures]:
        rounds.append(jobs)
        return [{"p50": 1.0, "p99": 2.0} for _ in jobs]

    monkeypatch.setattr(runner, "measure_in_turn", measure_in_turn)
    workload = Workload("w", "", Pattern.OPEN_LOOP, "mlp", 1, (Metric("p50", 0.6, 0.3),), ("a",), ("b",))
    runner.Runner(Results(ABOUT, 1.5, 2, "default")).measure(workload, "w")
    assert [[job.way for job in jobs] for jobs in rounds] == [["a", "b"], ["a", "b"]]
    assert [{(job.seed, job.seconds, job.warm_up) for job in jobs} for jobs in rounds] == [
        {(1, 1.5, 0.4)},
        {(2, 1.5, 0.4)},
    ]
