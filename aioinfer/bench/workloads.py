"""What is measured: the workloads, and the bar and the aim of each ratio. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["COLLATES", "MAX_BATCH_SIZE", "WORKLOADS", "Job", "Metric", "Pattern", "System", "Workload"]

MAX_BATCH_SIZE = 64
"""Of both systems; it is also the default of both."""

COLLATES = ("default", "stack")
"""How torchrl's server stacks requests: with its default, or with ``collate_fn=torch.stack``."""


class System(StrEnum):
    """Who is measured."""

    OURS = "aioinfer"
    TORCHRL = "torchrl"
    BARE = "bare"
    """The model called on a ready batch, without any plumbing."""


class Pattern(StrEnum):
    """How requests are made."""

    TASKS = "tasks"
    """Closed loop: asyncio tasks, each of which asks again as soon as it has its reply."""
    THREADS = "threads"
    """Closed loop: blocking threads."""
    ONE_THREAD = "one thread"
    """One blocking caller."""
    ONE_TASK = "one task"
    """One awaiting caller on the server's own event loop."""
    OPEN_LOOP = "open loop"
    """Requests at random times, whether or not earlier ones were answered."""
    BARE = "bare"
    """No requests: forward passes on a ready batch."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One ratio of a workload.

    Attributes:
        figure: what is compared: ``"rate"`` (requests/s, more is better) or a latency percentile in seconds
            (``"p50"``, ``"p99"``; less is better).
        bar: what the ratio has to reach (rate), or may reach at most (latency).
        aim: what it should reach.
        against: what our figure is divided by.
    """

    figure: str
    bar: float
    aim: float
    against: System = System.TORCHRL

    @property
    def higher_is_better(self) -> bool:
        """Whether a high ratio is a good one."""
        return self.figure == "rate"


@dataclass(frozen=True, slots=True)
class Workload:
    """One way to load a server.

    Attributes:
        name: as on the command line.
        summary: one line for tables.
        pattern: how requests are made.
        model: the model's name.
        callers: how many ask at once; for ``Pattern.BARE`` the rows of the batch.
        metrics: the ratios.
        ours: the transports of ours that are tried; the better one is kept.
        torchrl: the same for torchrl.
        rate: requests/s of an open loop.
        stretch: times the usual length of warm-up and measurement.
    """

    name: str
    summary: str
    pattern: Pattern
    model: str
    callers: int
    metrics: tuple[Metric, ...] = ()
    ours: tuple[str, ...] = ("threading", "slots")
    torchrl: tuple[str, ...] = ("threading", "slots")
    rate: float = 0.0
    stretch: float = 1.0

    def ways(self, system: System) -> tuple[str, ...]:
        """The transports by which ``system`` is tried on this workload; empty if it takes no part."""
        if system is System.BARE:
            takes_part = self.pattern is Pattern.BARE or any(metric.against is system for metric in self.metrics)
            return ("none",) if takes_part else ()
        if self.pattern is Pattern.BARE:
            return ()
        return self.ours if system is System.OURS else self.torchrl


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement, to be made in a process of its own; times in seconds."""

    workload: str
    system: str
    way: str
    warm_up: float
    seconds: float
    seed: int = 0
    torchrl_collate: str = "default"


def _rate(bar: float, aim: float, against: System = System.TORCHRL) -> tuple[Metric, ...]:
    return (Metric("rate", bar, aim, against),)


WORKLOADS: tuple[Workload, ...] = (
    Workload("tasks-tiny", "64 asyncio tasks, tiny", Pattern.TASKS, "tiny", 64, _rate(8, 12)),
    Workload("tasks-mlp", "64 asyncio tasks, mlp", Pattern.TASKS, "mlp", 64, _rate(5, 7)),
    Workload("tasks-big", "64 asyncio tasks, big", Pattern.TASKS, "big", 64, _rate(0.85, 0.93, System.BARE)),
    # torchrl's slots would need 10 000 threads here. One round of its replies takes about a second.
    Workload(
        "tasks-10k",
        "10 000 asyncio tasks, tiny",
        Pattern.TASKS,
        "tiny",
        10_000,
        _rate(6, 10),
        torchrl=("threading",),
        stretch=2.0,
    ),
    Workload("threads-tiny", "64 blocking threads, tiny", Pattern.THREADS, "tiny", 64, _rate(2, 3)),
    Workload("threads-mlp", "64 blocking threads, mlp", Pattern.THREADS, "mlp", 64, _rate(2, 3)),
    Workload("threads-big", "64 blocking threads, big", Pattern.THREADS, "big", 64, _rate(1.15, 1.5)),
    Workload("one-thread", "one blocking caller, mlp", Pattern.ONE_THREAD, "mlp", 1, (Metric("p50", 0.7, 0.5),)),
    Workload("one-task", "one awaiting caller, mlp", Pattern.ONE_TASK, "mlp", 1, (Metric("p50", 0.7, 0.5),)),
    # A slot has one request under way at most, so an open loop can't use slots.
    Workload(
        "open-loop",
        "4 000 requests/s at random times, mlp",
        Pattern.OPEN_LOOP,
        "mlp",
        1,
        (Metric("p50", 0.6, 0.35), Metric("p99", 0.6, 0.35)),
        ours=("threading",),
        torchrl=("threading",),
        rate=4000.0,
    ),
    Workload("bare-tiny-64", "bare forward, tiny, 64 rows", Pattern.BARE, "tiny", 64, stretch=0.5),
    Workload("bare-mlp-64", "bare forward, mlp, 64 rows", Pattern.BARE, "mlp", 64, stretch=0.5),
    Workload("bare-big-64", "bare forward, big, 64 rows", Pattern.BARE, "big", 64, stretch=0.5),
    Workload("bare-mlp-1", "bare forward, mlp, 1 row", Pattern.BARE, "mlp", 1, stretch=0.5),
)
