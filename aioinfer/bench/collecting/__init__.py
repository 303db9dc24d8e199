"""Measure collectors of experience: ours, torchrl's, and loops over Gymnasium's and EnvPool's environments.

Every measurement is one of a process of its own, as all of the benchmark's (see ``aioinfer.bench.measure``).
"""

from __future__ import annotations

from aioinfer.bench.collecting import environments, peers
from aioinfer.bench.report import Figures
from aioinfer.bench.workloads import Collection, Job, System, named

__all__ = ["load_package", "measure"]


def load_package(job: Job) -> None:
    """Import what the job's system and environments need, so that no import disturbs another job's measurement."""
    collection = named(job.workload).collection
    assert collection is not None
    environments.load(collection.environment)
    if job.system in (System.TORCHRL, System.TORCHRL_SERIAL):
        import torchrl.collectors
        import torchrl.envs  # noqa: F401


def measure(job: Job, collection: Collection) -> Figures:
    """Make one measurement.

    Returns:
        ``rate`` in steps/s; with ours perhaps ``own paces rate`` beside it, or other figures instead: times in seconds,
        ``updated after`` in steps, ``growth`` in megabytes.
    """
    if job.system == System.OURS:
        from aioinfer.bench.collecting import ours

        return ours.measure(job, collection)
    if job.system == System.CEILING:
        return {"rate": peers.measure_ceiling(job, collection)}
    return {"rate": peers.measure_rate(job, collection)}
