"""The workloads, and the bar and the aim of each ratio. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

MAX_BATCH_SIZE = 64
"""Of both systems, where a workload names no other; it is also the default of both."""

COLLATES = ("default", "stack", "both")
"""How torchrl's server stacks requests: with its default, with ``collate_fn=torch.stack``, or each in turn."""


class System(StrEnum):
    """The systems that are measured."""

    OURS = "aioinfer"
    TORCHRL = "torchrl"
    STACK = "torchrl-stack"  # torchrl's server with collate_fn=torch.stack
    BARE = "bare"  # the model called on a ready batch, without any plumbing
    # Those with whom collectors of experience are compared; torchrl's is its AsyncBatchedCollector.
    TORCHRL_SERIAL = "torchrl Collector"  # with a SerialEnv of 16 environments
    SYNC_VECTOR = "SyncVectorEnv"  # Gymnasium's, of 64 environments, and the bare policy
    ASYNC_VECTOR = "AsyncVectorEnv"  # Gymnasium's, of 32 environments in processes, and the bare policy
    ENVPOOL = "EnvPool"  # its asynchronous interface, and the bare policy
    # Those with whom servers over a network are compared.
    OPENPI = "openpi"  # its server, which computes one observation after the other
    LITSERVE = "LitServe"
    MOSEC = "Mosec"
    ECHO = "echo"  # a bare ASGI app that sends back what it gets
    SLOTS = "process slots"  # ours, on one machine
    CEILING = "ceiling"  # what two cores would reach if they did nothing but step and compute actions


class Pattern(StrEnum):
    """How requests are made."""

    TASKS = "tasks"  # closed loop: asyncio tasks, each of which makes its next request at its reply
    THREADS = "threads"  # closed loop: blocking threads
    ONE_THREAD = "one thread"  # one blocking caller
    ONE_TASK = "one task"  # one awaiting caller on the server's own event loop
    OPEN_LOOP = "open loop"  # requests at random times, whether or not earlier ones were answered
    GROUPS = "groups"  # closed loop: a thread steps one group of environments while the others wait for replies
    BARE = "bare"  # no requests: forward passes on a ready batch
    SEND = "send"  # no requests: a trainer sends weights to a server in another process until applied, in a loop
    PUBLISHING = "publishing"  # closed loop of tasks; by turns, a trainer in another process publishes at a rate
    GAP = "gap"  # closed loop of tasks, and a trainer in another process that publishes once in a while
    COLLECT = "collect"  # a collector of experience, see Collection
    SERVE = "serve"  # closed loop of callers over a network, see Serving


class RequestKind(StrEnum):
    """How a caller makes its requests. It has their observation before the clock starts.

    A caller of any kind but the first also reads the action of each reply.
    """

    REUSED = "reused"  # one TensorDict, again and again
    FRESH = "fresh"  # a new TensorDict for each request, of an observation that is a tensor
    ARRAY = "array"  # client(observation=...) with a numpy array
    TENSOR = "tensor"  # the same with a tensor


class Course(StrEnum):
    """What happens while a collector is measured."""

    FRAMES = "frames"  # nothing: its frames are counted
    OWN_PACES = "own paces"  # the same, after the same environments stepped without a policy
    KILL = "kill"  # a worker is killed
    HANG = "hang"  # an environment hangs, which is to be noticed; then another one, beside which the collector closes
    UPDATE = "update"  # the weights of the policy change
    MEMORY = "memory"  # a million frames are collected


class Protocol(StrEnum):
    """How callers over a network ask."""

    OPENPI = "openpi"  # a blocking WebSocket for each robot
    HTTP_JSON = "JSON"  # the Open Inference Protocol; peers have JSON of their own
    HTTP_BINARY = "binary"  # the same with binary tensors
    STREAM = "stream"  # tasks of another process, on one connection


@dataclass(frozen=True, slots=True)
class Serving:
    """How a policy is asked over a network.

    Attributes:
        protocol: of the callers.
        pass_time: seconds of a pass of the robots' policy, for any batch.
        images: whether robots send two images of 224 x 224 pixels.
        idle_connections: that never finish the head of a request, in the second half of the measurement.
        slow_senders: that send a body byte by byte meanwhile.
    """

    protocol: Protocol
    pass_time: float = 0.0
    images: bool = False
    idle_connections: int = 0
    slow_senders: int = 0


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collector of experience does.

    Attributes:
        environment: ``"CartPole"``, ``"Pong"``, ``"EnvPool"`` for its CartPole, or ``"sleeping"`` for one that awaits.
        num_envs: environments of ours; a peer has as many as suit it, or as its name says.
        num_workers: processes that step them; with 0 it is the collector's own.
        frames_per_batch: steps in a batch.
        fragment_length: consecutive steps of one environment.
        order: which fragments are a batch.
        local_inference: whether groups run the policy themselves; ``None``: where they can.
        course: what happens meanwhile.
    """

    environment: str = "CartPole"
    num_envs: int = 64
    num_workers: int = 2
    frames_per_batch: int = 2048
    fragment_length: int = 64
    order: Literal["fair", "first"] = "fair"
    local_inference: bool | None = None
    course: Course = Course.FRAMES


UNITS = {
    "median": "ms",
    "noticed after": "s",
    "recovered after": "s",
    "shut down after": "s",
    "updated after": "steps",
    "growth": "MB",
}
"""The figures that are judged as they are, in units that a bar names; most are compared with another one."""


def is_rate(figure: str) -> bool:
    """Whether a figure is in requests or steps per second, and more is better. Of all others, less is better."""
    return figure.endswith("rate")


@dataclass(frozen=True, slots=True)
class Metric:
    """One ratio of a workload.

    Attributes:
        figure: the figure that is compared: a rate in requests/s or steps/s, or a time in seconds, such as ``"p50"``;
            or one of ``UNITS``.
        bar: the least ratio that passes (rate), or the largest (time).
        aim: the ratio to strive for.
        against: the system by whose figure ours is divided; ``None``: by none, the bar and the aim are of the figure.
        over: the name of that figure; ``None``: the same. With it, our figure can be compared with another one of ours.
        stack_bar: the bar where ours is divided by the figure of torchrl with ``torch.stack``; ``None``: there is none.
    """

    figure: str
    bar: float
    aim: float
    against: System | None = System.TORCHRL
    over: str | None = None
    stack_bar: float | None = None

    @property
    def divisor(self) -> str:
        """The other's figure."""
        return self.over or self.figure

    @property
    def higher_is_better(self) -> bool:
        """Whether a high ratio is a good one."""
        return is_rate(self.figure)

    def verdict(self, ratio: float) -> str:
        """Whether a ratio meets the aim, the bar, or neither."""
        for limit, verdict in ((self.aim, "aim met"), (self.bar, "bar met")):
            if self.meets(ratio, limit):
                return verdict
        return "bar missed"

    def meets(self, ratio: float, limit: float) -> bool:
        """Whether a ratio is as good as ``limit``, or better."""
        return ratio >= limit if self.higher_is_better else ratio <= limit


_PEERS = (
    *(System.TORCHRL_SERIAL, System.SYNC_VECTOR, System.ASYNC_VECTOR, System.ENVPOOL, System.CEILING),
    *(System.OPENPI, System.LITSERVE, System.MOSEC, System.ECHO, System.SLOTS),
)
"""The systems that collectors alone, or servers over a network, are compared with."""


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The size of a model that a trainer publishes, all parameters together."""

    nbytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One way to load a server.

    Attributes:
        name: as on the command line.
        summary: one line for tables.
        pattern: how requests are made.
        model: the model's name.
        callers: number of concurrent callers; for ``Pattern.BARE`` the rows of the batch.
        metrics: the ratios.
        ours: the transports of ours that are tried, or the schemes where a trainer publishes; the better one is kept.
        torchrl: the same for torchrl; empty if it takes no part.
        rate: requests/s of an open loop, or updates/s of a trainer.
        stretch: times the usual length of warm-up and measurement.
        weights: the size of a trainer's model; its passes do not use most of the parameters.
        swap: whether our server has ``swap_weights=True``.
        processes: number of other processes that share the callers; with 0 they are in the server's. Awaiting callers
            have one event loop in each.
        think_time: seconds from a reply to the next request of a blocking caller in another process.
        rows: rows of each request; with 0 a request is one row, and has no dimension for them.
        max_batch_size: most rows in one forward pass.
        collection: what a collector of experience does.
        serving: how callers over a network ask.
        peers: the systems with which it is compared, each of which has one way to run; beside torchrl's.
        requires: modules without which nothing is measured.
        request_kinds: how callers make requests. With several of them, each has a rate of its own, and they take turns
            with the same server and the same callers.
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
    weights: WeightSet | None = None
    swap: bool = False
    processes: int = 0
    think_time: float = 0.0
    rows: int = 0
    max_batch_size: int = MAX_BATCH_SIZE
    request_kinds: tuple[RequestKind, ...] = (RequestKind.REUSED,)
    collection: Collection | None = None
    serving: Serving | None = None
    peers: tuple[System, ...] = ()
    requires: tuple[str, ...] = ()

    @property
    def one_thread(self) -> bool:
        """Whether an operator gets one thread: other processes need a core, or a large batch would use all of them."""
        return self.weights is not None or self.processes > 0 or self.rows > 0 or bool(self.collection or self.serving)

    @property
    def batch_size(self) -> tuple[int, ...]:
        """Of each request."""
        return (self.rows,) if self.rows else ()

    @property
    def has_latencies(self) -> bool:
        """Whether latencies are measured, perhaps beside a rate."""
        return any(metric.figure.startswith("p") for metric in self.metrics)

    @property
    def turns(self) -> tuple[RequestKind, ...]:
        """The kinds of requests as they are measured, each early as often as late, against drifts."""
        kinds = self.request_kinds
        return kinds if len(kinds) == 1 else (*kinds, *reversed(kinds)) * 2

    def rate_figure(self, kind: RequestKind) -> str:
        """The name of the rate that callers reach with requests of one kind."""
        return "rate" if len(self.request_kinds) == 1 else f"{kind} rate"

    def systems(self, collate: str | None) -> list[System]:
        """The systems that take part.

        Args:
            collate: how torchrl's server stacks requests, one of ``COLLATES``; ``None`` leaves torchrl out. With
                ``"stack"`` it comes as it is where its server stacks no requests.
        """
        left_out: set[System] = set()
        if collate is None or (collate == "stack" and self.ways(System.STACK)):
            left_out.add(System.TORCHRL)
        if collate is None:
            left_out.add(System.TORCHRL_SERIAL)
        if collate is None or collate == "default":
            left_out.add(System.STACK)
        return [system for system in System if system not in left_out and self.ways(system)]

    def ways(self, system: System) -> tuple[str, ...]:
        """The transports or schemes by which ``system`` is tried on this workload; empty if it takes no part."""
        if system in _PEERS:
            return ("none",) if system in self.peers else ()
        if system is System.BARE:
            takes_part = self.pattern is Pattern.BARE or any(metric.against is system for metric in self.metrics)
            return ("none",) if takes_part else ()
        # torchrl's servers gather requests from process slots without a collate_fn.
        process_slots = any(way.startswith("process slots") for way in self.torchrl)
        stacked = self.weights is None and self.pattern not in (Pattern.COLLECT, Pattern.SERVE) and not process_slots
        if self.pattern is Pattern.BARE or (system is System.STACK and not stacked):
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


def _rate(
    bar: float, aim: float, against: System = System.TORCHRL, *, stack_bar: float | None = None
) -> tuple[Metric, ...]:
    return (Metric("rate", bar, aim, against, stack_bar=stack_bar),)


def _fresh(workload: Workload, bar: float, aim: float) -> Workload:
    """The same load, whose callers make a TensorDict for each request."""
    return replace(
        workload,
        name=f"{workload.name}-fresh",
        summary=f"{workload.summary}, a fresh TensorDict for each request",
        metrics=_rate(bar, aim),
        request_kinds=(RequestKind.FRESH,),
    )


def _by_name(workload: Workload) -> Workload:
    """The same load, whose callers send observations by name, beside one that sends a TensorDict again and again."""
    kinds = RequestKind.ARRAY, RequestKind.TENSOR, RequestKind.REUSED
    over = f"{RequestKind.REUSED} rate"
    return replace(
        workload,
        name=f"{workload.name}-named",
        summary=f"{workload.summary}, observations by name",
        metrics=tuple(Metric(f"{kind} rate", 0.8, 0.95, System.OURS, over=over) for kind in kinds[:-1]),
        torchrl=(),
        request_kinds=kinds,
        stretch=3.0 * workload.stretch,
    )


def _blocking(
    name: str, summary: str, processes: int, metrics: tuple[Metric, ...], way: str = "process slots"
) -> Workload:
    """One blocking caller in each of several processes."""
    pattern = Pattern.ONE_THREAD if processes == 1 else Pattern.THREADS
    return Workload(name, summary, pattern, "mlp", processes, metrics, (way,), (way,), processes=processes)


def _awaiting(name: str, summary: str, callers: int, metrics: tuple[Metric, ...], model: str = "mlp") -> Workload:
    """Tasks in two processes. torchrl's replies can't be awaited there: one thread waits for those of all its callers.

    With a thread for each of 16 callers it answers 8 000 requests/s instead of 16 000 to 22 000. A heat that a busy
    neighbour disturbs could choose that, so it is not tried.
    """
    ways = "process slots in turn", "process slots in rounds"
    return Workload(name, summary, Pattern.TASKS, model, callers, metrics, ("process slots",), ways, processes=2)


def _slow(
    name: str,
    summary: str,
    pattern: Pattern,
    metrics: tuple[Metric, ...],
    way: str = "threading",
    *,
    callers: int = 8,
    torchrl: bool = False,
    processes: int = 0,
    think_time: float = 0.0,
) -> Workload:
    """A pass of 10 ms, whatever the batch. The bare model is what all callers in one batch would get."""
    return Workload(
        name,
        f"{summary}, passes of 10 ms",
        pattern,
        "slow",
        callers,
        metrics,
        (way,),
        (way,) if torchrl else (),
        stretch=0.7,
        processes=processes,
        think_time=think_time,
    )


def _rows(
    name: str,
    summary: str,
    metric: Metric,
    way: str = "threading",
    *,
    pattern: Pattern = Pattern.ONE_THREAD,
    rows: int = 1024,
    callers: int = 1,
    processes: int = 0,
) -> Workload:
    """Requests of several rows, each of which fills a batch. torchrl's servers have none such."""
    return Workload(
        name,
        summary,
        pattern,
        "mlp",
        callers,
        (metric,),
        (way,),
        (),
        processes=processes,
        rows=rows,
        max_batch_size=rows,
    )


def _send(name: str, summary: str, tensors: int, bar: float, aim: float) -> Workload:
    """``send(sync=True)`` of 1 MB until applied, over torchrl's scheme."""
    metrics, weights = (Metric("p50", bar, aim),), WeightSet(1_000_000, tensors)
    return Workload(name, summary, Pattern.SEND, "tiny", 0, metrics, ("queues",), ("queues",), weights=weights)


def _large(name: str, summary: str, metric: Metric, scheme: str, *, swap: bool = True) -> Workload:
    """420 MB until applied, or the longest gap between passes meanwhile, over one copy of as many bytes. Ours alone."""
    pattern, model, callers = (Pattern.GAP, "mlp", 4) if metric.figure == "gap" else (Pattern.SEND, "tiny", 0)
    weights = WeightSet(420_000_000, 50)
    return Workload(
        name, summary, pattern, model, callers, (metric,), (scheme,), (), stretch=4.0, weights=weights, swap=swap
    )


def _collect(
    name: str,
    summary: str,
    metrics: tuple[Metric, ...],
    collection: Collection,
    *,
    torchrl: tuple[str, ...] = (),
    requires: tuple[str, ...] = (),
    stretch: float = 2.0,
) -> Workload:
    """A collector of experience, and those with whom it is compared."""
    return Workload(
        name,
        summary,
        Pattern.COLLECT,
        "64-64",
        0,
        metrics,
        (f"{collection.num_workers} workers" if collection.num_workers else "no workers",),
        torchrl,
        stretch=stretch,
        collection=collection,
        peers=tuple(metric.against for metric in metrics if metric.against in _PEERS),
        requires=("gymnasium", *requires),
    )


def _serve(
    name: str,
    summary: str,
    callers: int,
    metrics: tuple[Metric, ...],
    serving: Serving,
    *requires: str,
    stretch: float = 1.0,
) -> Workload:
    """Callers over a network, on the loopback interface. The server and the callers have a process each."""
    return Workload(
        name,
        summary,
        Pattern.SERVE,
        "mlp",
        callers,
        metrics,
        ("network",),
        (),
        stretch=stretch,
        serving=serving,
        peers=tuple(metric.against for metric in metrics if metric.against in _PEERS),
        requires=("starlette", "uvicorn", "websockets", "msgpack", *requires),
    )


def _bare(model: str, rows: int) -> Workload:
    """Forward passes on a ready batch."""
    summary = f"bare forward, {model}, {rows} row{'s' if rows > 1 else ''}"
    return Workload(f"bare-{model}-{rows}", summary, Pattern.BARE, model, rows, stretch=0.5)


_THREADING = ("threading",)
_TOGETHER = Metric("rate", 0.875, 0.95, System.BARE)
_ALONE = Metric("p50", 1.1, 1.04, System.BARE)
_COPY = Metric("p50", 3, 1.6, System.OURS, over="memcpy")
_GAP = Metric("gap", 1.5, 0.05, System.OURS, over="memcpy")

_TASKS_TINY = Workload("tasks-tiny", "64 asyncio tasks, tiny", Pattern.TASKS, "tiny", 64, _rate(10, 14, stack_bar=6))
_TASKS_MLP = Workload("tasks-mlp", "64 asyncio tasks, mlp", Pattern.TASKS, "mlp", 64, _rate(6.5, 8, stack_bar=4.5))
_THREADS_TINY = Workload("threads-tiny", "64 blocking threads, tiny", Pattern.THREADS, "tiny", 64, _rate(2, 3))
_PROCESSES_8 = _blocking("processes-8", "8 processes, one blocking caller each, mlp", 8, _rate(4.5, 7))
_PROCESSES_2X64 = _awaiting("processes-2x64", "2 processes of 64 asyncio tasks, mlp", 128, _rate(8, 10))

WORKLOADS: tuple[Workload, ...] = (
    _TASKS_TINY,
    _TASKS_MLP,
    Workload("tasks-big", "64 asyncio tasks, big", Pattern.TASKS, "big", 64, _rate(0.92, 0.96, System.BARE)),
    # torchrl's slots would need 10 000 threads here. One round of its replies takes about a second.
    Workload(
        "tasks-10k",
        "10 000 asyncio tasks, tiny",
        Pattern.TASKS,
        "tiny",
        10_000,
        _rate(10, 14),
        torchrl=_THREADING,
        stretch=2.0,
    ),
    _fresh(_TASKS_TINY, 6.5, 9),
    _fresh(_TASKS_MLP, 5, 6.5),
    _by_name(_TASKS_TINY),
    _by_name(_TASKS_MLP),
    _THREADS_TINY,
    Workload("threads-mlp", "64 blocking threads, mlp", Pattern.THREADS, "mlp", 64, _rate(2, 3)),
    Workload("threads-big", "64 blocking threads, big", Pattern.THREADS, "big", 64, _rate(1.15, 1.5)),
    _by_name(_THREADS_TINY),
    Workload("one-thread", "one blocking caller, mlp", Pattern.ONE_THREAD, "mlp", 1, (Metric("p50", 0.42, 0.3),)),
    Workload("one-task", "one awaiting caller, mlp", Pattern.ONE_TASK, "mlp", 1, (Metric("p50", 0.45, 0.3),)),
    # A slot has one request under way at most, so an open loop can't use slots.
    Workload(
        "open-loop",
        "4 000 requests/s at random times, mlp",
        Pattern.OPEN_LOOP,
        "mlp",
        1,
        (Metric("p50", 0.35, 0.2), Metric("p99", 0.35, 0.2)),
        _THREADING,
        _THREADING,
        rate=4000.0,
    ),
    _blocking("processes-4", "4 processes, one blocking caller each, mlp", 4, _rate(4, 6)),
    _PROCESSES_8,
    _by_name(_PROCESSES_8),
    _blocking("processes-4-pickles", "4 processes, one blocking caller each, mlp, pickled", 4, _rate(2, 4), "pickles"),
    _blocking("process-one", "one blocking caller in another process, mlp", 1, (Metric("p50", 0.32, 0.25),)),
    _awaiting("processes-2x16", "2 processes of 16 asyncio tasks, mlp", 32, _rate(6, 8)),
    _PROCESSES_2X64,
    _by_name(_PROCESSES_2X64),
    _awaiting(
        "processes-images", "2 processes of 16 asyncio tasks, uint8 [3, 84, 84], cnn", 32, _rate(2.2, 2.6), "cnn"
    ),
    _slow("slow-tasks-8", "8 asyncio tasks", Pattern.TASKS, (_TOGETHER,), torchrl=True),
    _slow("slow-threads-8", "8 blocking threads", Pattern.THREADS, (_TOGETHER,), torchrl=True),
    _slow(
        "slow-processes-8",
        "8 processes, one blocking caller each",
        Pattern.THREADS,
        (Metric("rate", 0.8, 0.9, System.BARE), Metric("p50", 1.28, 1.12, System.BARE)),
        "process slots",
        torchrl=True,
        processes=8,
    ),
    _slow(
        "slow-processes-8-pickles",
        "8 processes, one blocking caller each, pickled",
        Pattern.THREADS,
        (Metric("rate", 0.8, 0.9, System.BARE), Metric("p50", 1.28, 1.12, System.BARE)),
        "pickles",
        processes=8,
    ),
    _slow(
        "slow-processes-8-thinking",
        "8 processes, each of which thinks for 3 ms between requests",
        Pattern.THREADS,
        (_TOGETHER,),
        "process slots",
        processes=8,
        think_time=0.003,
    ),
    _slow("slow-one-thread", "one blocking caller", Pattern.ONE_THREAD, (_ALONE,), callers=1),
    _slow("slow-one-task", "one awaiting caller", Pattern.ONE_TASK, (_ALONE,), callers=1),
    _slow(
        "slow-process-one",
        "one blocking caller in another process",
        Pattern.ONE_THREAD,
        (_ALONE,),
        "process slots",
        callers=1,
        processes=1,
    ),
    _rows("rows-1024", "one blocking caller with 1 024 rows, mlp", Metric("p50", 1.3, 1.1, System.OURS, over="pass")),
    _rows(
        "rows-1024-policy",
        "a PolicyClientModule called with 1 024 rows, mlp",
        Metric("p50", 1.3, 1.1, System.OURS, over="pass"),
        "policy module",
    ),
    _rows(
        "rows-1024-process",
        "one blocking caller with 1 024 rows in another process, mlp",
        Metric("p50", 1.6, 1.3, System.OURS, over="pass"),
        "process slots",
        processes=1,
    ),
    _rows(
        "rows-2x2x64",
        "2 processes of 2 groups of 64 environments, mlp",
        Metric("rate", 0.85, 0.95, System.OURS, over="pass rate"),
        "process slots",
        pattern=Pattern.GROUPS,
        rows=64,
        callers=4,
        processes=2,
    ),
    _send("weights-1mb-8", "1 MB in 8 tensors until applied in another process", 8, 1.0, 0.4),
    _send("weights-1mb-200", "1 MB in 200 tensors until applied in another process", 200, 0.5, 0.25),
    _large("weights-420mb", "420 MB until applied in another process", _COPY, "queues", swap=False),
    _large("weights-420mb-shared", "420 MB in shared memory that the server reads", _COPY, "shared memory"),
    Workload(
        "weights-publishing",
        "64 asyncio tasks, mlp, while 20 MB are published 10 times a second",
        Pattern.PUBLISHING,
        "mlp",
        64,
        (Metric("rate", 0.85, 0.97, System.OURS, over="quiet rate"),),
        ours=("queues",),
        torchrl=(),
        rate=10.0,
        stretch=4.0,
        weights=WeightSet(20_000_000, 50),
    ),
    _large("weights-gap", "longest gap between passes, 420 MB copied in place", _GAP, "queues", swap=False),
    _large("weights-gap-swap", "longest gap between passes, 420 MB in a spare copy, swapped", _GAP, "queues"),
    _large(
        "weights-gap-shared",
        "longest gap between passes, 420 MB in shared memory, swapped",
        _GAP,
        "shared memory",
        swap=True,
    ),
    _collect(
        "collect-cartpole",
        "CartPole, 64 environments in 2 workers",
        (
            *_rate(40, 70),
            *_rate(12, 20, System.TORCHRL_SERIAL),
            *_rate(0.95, 1.3, System.SYNC_VECTOR),
            *_rate(8, 12, System.ASYNC_VECTOR),
        ),
        Collection(),
        torchrl=("4 threads", "16 threads", "64 threads", "4 processes", "64 in 2 processes"),
    ),
    _collect(
        "collect-cartpole-no-workers",
        "CartPole, 64 environments in the collector's process",
        _rate(0.75, 0.95, System.SYNC_VECTOR),
        Collection(num_workers=0),
    ),
    _collect(
        "collect-cartpole-served",
        "CartPole, 64 environments in 2 workers, which ask a server",
        _rate(0.6, 0.95, System.SYNC_VECTOR),
        Collection(local_inference=False),
    ),
    _collect(
        "collect-envpool",
        "256 CartPoles of EnvPool, which steps 128 at once",
        _rate(0.6, 0.85, System.ENVPOOL),
        Collection("EnvPool", 256, 0, frames_per_batch=16_384),
        requires=("envpool",),
    ),
    _collect(
        "collect-pong",
        "Pong, 32 environments in 2 workers, uint8 [210, 160]",
        _rate(0.8, 0.9, System.CEILING),
        Collection("Pong", 32, frames_per_batch=512, fragment_length=16),
        requires=("ale_py",),
        stretch=3.0,
    ),
    _collect(
        "collect-sleeping",
        "32 environments that await 5 ms, and one of them 100 ms",
        (Metric("rate", 0.9, 0.97, System.OURS, over="own paces rate"),),
        Collection("sleeping", 32, 0, 256, 16, order="first", course=Course.OWN_PACES),
        stretch=4.0,
    ),
    _collect(
        "collect-killed",
        "a worker is killed until its 32 environments step again, without the time of making them",
        (Metric("recovered after", 2, 1, None),),
        Collection(course=Course.KILL),
        stretch=4.0,
    ),
    _collect(
        "collect-hung",
        "an environment hangs in a worker",
        (Metric("noticed after", 0.5, 0.2, None), Metric("shut down after", 5, 2, None)),
        Collection(order="first", course=Course.HANG),
        stretch=4.0,
    ),
    _collect(
        "collect-hung-no-workers",
        "an environment hangs in a thread of the collector's process",
        (Metric("noticed after", 0.5, 0.2, None), Metric("shut down after", 5, 2, None)),
        Collection(num_workers=0, order="first", course=Course.HANG),
        stretch=4.0,
    ),
    _collect(
        "collect-updated",
        "the first step with new weights, counted from when update_weights returns",
        (Metric("updated after", 2, 1, None),),
        Collection(course=Course.UPDATE),
    ),
    _collect(
        "collect-memory",
        "memory after a million frames, all processes together",
        (Metric("growth", 10, 2, None),),
        Collection(course=Course.MEMORY),
        stretch=10.0,
    ),
    _serve(
        "web-robots-8",
        "8 robots, openpi's protocol, passes of 10 ms",
        8,
        (*_rate(6, 7.3, System.OPENPI), Metric("median", 13, 11.5, None)),
        Serving(Protocol.OPENPI, pass_time=0.01),
        stretch=2.0,
    ),
    _serve(
        "web-robot",
        "one robot, openpi's protocol, a pass of 10 ms: 0.05 is 0.5 ms",
        1,
        (Metric("p50", 1.05, 1.02, System.OPENPI),),
        Serving(Protocol.OPENPI, pass_time=0.01),
    ),
    _serve(
        "web-robot-small",
        "one robot, openpi's protocol, a policy that does nothing",
        1,
        (Metric("p50", 1.6, 1.2, System.OPENPI),),
        Serving(Protocol.OPENPI),
    ),
    _serve(
        "web-robot-images",
        "the same, with two images of 224 x 224 pixels",
        1,
        (Metric("p50", 1.2, 1, System.OPENPI),),
        Serving(Protocol.OPENPI, images=True),
    ),
    _serve(
        "web-json",
        "64 HTTP connections, JSON, mlp",
        64,
        (*_rate(15, 20, System.LITSERVE), *_rate(1.2, 1.5, System.MOSEC)),
        Serving(Protocol.HTTP_JSON),
        "litserve",
        "mosec",
    ),
    _serve(
        "web-binary",
        "64 HTTP connections, binary tensors, mlp",
        64,
        _rate(0.6, 0.8, System.ECHO),
        Serving(Protocol.HTTP_BINARY),
    ),
    _serve(
        "web-idle",
        "8 HTTP connections, JSON, mlp, beside 1 000 half-open connections and 100 slow senders",
        8,
        (Metric("p99", 1.2, 1.05, System.OURS, over="quiet p99"),),
        Serving(Protocol.HTTP_JSON, idle_connections=1000, slow_senders=100),
        stretch=4.0,
    ),
    _serve(
        "web-stream",
        "64 asyncio tasks in another process, over a WebSocket, mlp",
        64,
        _rate(0.4, 0.7, System.SLOTS),
        Serving(Protocol.STREAM),
    ),
    *(_bare(model, rows) for model, rows in (("tiny", 64), ("mlp", 64), ("big", 64), ("cnn", 32), ("mlp", 1))),
)


def named(name: str) -> Workload:
    """The workload of this name."""
    return next(workload for workload in WORKLOADS if workload.name == name)
