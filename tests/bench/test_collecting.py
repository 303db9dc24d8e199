"""The measurements of collectors of experience."""

from importlib.util import find_spec

import pytest

from aioinfer.bench import report, runner
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
