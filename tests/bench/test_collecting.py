"""The measurements of collectors of experience."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from aioinfer.bench import report, runner
from aioinfer.bench.collecting.environment_log import EnvironmentLog
from aioinfer.bench.collecting.ours import covered_seconds, steps_until
from aioinfer.bench.report import Comparison, Entry, Figures, Results
from aioinfer.bench.workloads import WORKLOADS, Collection, Metric, Pattern, System, Workload
from tests.bench.parts import ABOUT, BY_NAME, alone, job, results

PEERS = {
    (System.TORCHRL, "collect-cartpole", "4 threads"): "torchrl",
    (System.TORCHRL_SERIAL, "collect-cartpole", "none"): "torchrl",
    (System.SYNC_VECTOR, "collect-cartpole", "none"): "gymnasium",
    (System.ASYNC_VECTOR, "collect-cartpole", "none"): "gymnasium",
    (System.ENVPOOL, "collect-envpool", "none"): "envpool",
    (System.CEILING, "collect-pong", "none"): "ale_py",
}


def test_each_peer_is_measured() -> None:
    jobs = [job(name, system, way) for (system, name, way), module in PEERS.items() if find_spec(module) is not None]
    for each, outcome in zip(jobs, runner.measure_in_turn(jobs), strict=True):
        assert not isinstance(outcome, runner.MeasurementError), f"{each.system}: {outcome}"
        assert outcome["rate"] > 0, each.system


OURS = {
    "collect-sleeping": {"rate", "own paces rate"},
    "collect-killed": {"recovered after", "making"},
    "collect-hung-no-workers": {"noticed after", "shut down after"},
    "collect-updated": {"updated after"},
}


@pytest.mark.stress
def test_ours_is_measured() -> None:
    outcomes = runner.measure_in_turn([job(name, System.OURS, "") for name in OURS])
    for name, outcome in zip(OURS, outcomes, strict=True):
        assert not isinstance(outcome, runner.MeasurementError), f"{name}: {outcome}"
        assert set(outcome) == OURS[name]


def test_time_that_several_spend_at_once_counts_once() -> None:
    begins, ends = np.array([5.0, 1.0, 1.5, 9.0]), np.array([6.0, 2.0, 3.0, 9.5])
    assert covered_seconds(begins, ends) == 3.5


def test_the_first_step_with_new_weights_counts_from_the_steps_that_were_begun() -> None:
    fragments = [[np.array([4, 4, 4, 5]), np.array([5, 5, 6, 6])], [np.array([4, 4, 5, 5])]]
    begun = [np.array([3, 1]), np.array([5, 4])]  # at the two updates
    # The second one is in no step of environment 1 yet.
    assert steps_until(fragments, begun) == [1, 2, 2]


def test_an_environment_logs_what_it_does() -> None:
    with EnvironmentLog(2) as log:
        environment = log.factories()[1]()
        environment.reset(seed=1)
        for _ in range(3):
            environment.step(1)
        assert log.steps.tolist() == [0, 3]
        assert log.makings.tolist() == [0, 1]
        assert log.made_from[1] <= log.made_until[1] <= log.first_step[1]
        log.factories()[1]()
        assert log.first_step[1] == 0
        assert log.steps[1] == 3
        path = Path(log.path)
        assert path.exists()
    assert not path.exists()


def test_every_peer_of_the_workloads_is_one_that_is_measured_here() -> None:
    compared = {metric.against for each in WORKLOADS if each.collection for metric in each.metrics}
    assert compared - {None, System.OURS} == {system for system, _, _ in PEERS}


def test_peers_of_collectors_take_part_where_ours_is_compared_with_them_and_torchrls_where_it_is_there() -> None:
    cartpole = BY_NAME["collect-cartpole"]
    gymnasium = [System.OURS, System.SYNC_VECTOR, System.ASYNC_VECTOR]
    assert cartpole.systems(None) == gymnasium
    torchrls = {System.TORCHRL, System.TORCHRL_SERIAL}
    assert set(cartpole.systems("both")) == set(cartpole.systems("default")) == {*gymnasium, *torchrls}
    assert BY_NAME["collect-pong"].systems("both") == [System.OURS, System.CEILING]
    assert BY_NAME["tasks-big"].systems("default") == [System.OURS, System.TORCHRL, System.BARE]


def test_a_workload_whose_package_is_missing_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_in_turn", lambda jobs: [{"rate": 1.0} for _ in jobs])
    figures = Results(ABOUT, 1.5, 1, None)
    for name, module in (("absent", "no_such_module"), ("present", "json")):
        runner.Runner(figures).measure(workload(name, module), name)
    assert [each.workload.name for each in figures.comparisons] == ["present"]
    shown = report.text(figures)
    assert "SKIPPED: absent: no_such_module is not installed" in shown
    assert not figures.crashes


def test_a_figure_that_is_compared_with_nothing_is_judged_as_it_is() -> None:
    times = alone("collect-hung", {"noticed after": 0.25, "shut down after": 1.0}, {"noticed after": 0.35})
    shown = [" ".join(line.split()) for line in report.text(results(times)).splitlines()]
    assert "collect-hung noticed after 0.30 s - 0.30 0.25 to 0.35 <= 0.5 s <= 0.2 s bar met" in shown
    assert "collect-hung shut down after 1.00 s - 1.00 1.00 to 1.00 <= 5 s <= 2 s aim met" in shown


def test_a_collector_is_compared_with_several_systems_in_one_table() -> None:
    rates: dict[System, float] = {System.OURS: 90_000, System.SYNC_VECTOR: 60_000, System.ASYNC_VECTOR: 9_000}
    entries = {system: Entry("none", repeats=[Figures(rate=rate)]) for system, rate in rates.items()}
    shown = report.text(results(Comparison(BY_NAME["collect-cartpole"], entries)))
    rows = [" ".join(line.split()) for line in shown.splitlines() if line.startswith("collect-cartpole")]
    assert rows[0] == "collect-cartpole rate 90,000/s - - - >= 40 >= 70 -"
    assert "SyncVectorEnv 60,000/s 1.50" in rows[2]
    assert "AsyncVectorEnv 9,000/s 10.0" in rows[3]
    assert "gymnasium 1.4.0, ale-py not installed" in shown


def workload(name: str, module: str) -> Workload:
    metrics = (Metric("rate", 1, 2, System.SYNC_VECTOR),)
    return Workload(
        name,
        "",
        Pattern.COLLECT,
        "",
        0,
        metrics,
        ("2 workers",),
        (),
        collection=Collection(),
        peers=(System.SYNC_VECTOR,),
        requires=(module,),
    )
