"""Results and options for the tests of the benchmark."""

import argparse

from aioinfer import bench
from aioinfer.bench.report import Comparison, Entry, Figures, Results
from aioinfer.bench.workloads import WORKLOADS, Job, System

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
    "gymnasium": "1.4.0",
    "ale-py": None,
    "envpool": None,
    "load": "0.1",
    "date": "2026-11-01T00:00:00+00:00",
}


def comparison(name: str, **repeats: list[float | None]) -> Comparison:
    workload = BY_NAME[name]
    figure = workload.metrics[0].figure if workload.metrics else "rate"
    made: dict[System, Entry] = {}
    for system, values in repeats.items():
        figures: list[Figures | None] = [None if value is None else {figure: value} for value in values]
        made[System(system)] = Entry("threading", repeats=figures)
    return Comparison(workload, made)


def alone(name: str, *repeats: Figures | None) -> Comparison:
    """A workload on which our figure is compared with another one of ours."""
    return Comparison(BY_NAME[name], {System.OURS: Entry("queues", repeats=list(repeats))})


def results(*comparisons: Comparison, crashes: tuple[str, ...] = ()) -> Results:
    return Results(ABOUT, 1.5, 3, "default", list(comparisons), list(crashes))


def job(workload: str, system: System = System.OURS, way: str = "threading", seconds: float = 0.2) -> Job:
    return Job(workload, system, way, warm_up=0.01, seconds=seconds, seed=1)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)
