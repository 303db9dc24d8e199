"""Serve a trace of requests in virtual time, with the scheduler that the model thread uses."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from aioinfer.batching import Caller, DispatchReason, Hold, ScheduledRequest
from aioinfer.bench.simulation.costs import Cost

__all__ = ["Arrivals", "Client", "Result", "Scheduler", "simulate"]

_LEAST_HOLD = 1e-9  # a shorter one might not move the clock


class Scheduler(Protocol):
    """What a ``BatchScheduler`` does for the model thread."""

    def decide(
        self,
        *,
        now: float,
        pending: int,
        oldest: float,
        free_since: float,
        callers: int | None = None,
        draining: bool = False,
    ) -> DispatchReason | Hold: ...

    @property
    def batch_size(self) -> int: ...

    def on_batch(self, requests: Sequence[ScheduledRequest]) -> None: ...

    def on_pass(self, rows: int, seconds: float) -> None: ...

    def on_replies(self, requests: Sequence[ScheduledRequest], submitted_at: Sequence[float], now: float) -> None: ...


@dataclass(slots=True)
class _Request:
    caller: Caller | None
    rows: int = 1


@dataclass(slots=True)
class Client:
    """Who asks.

    Attributes:
        first: when it makes its first request.
        thinks: seconds from each reply to its next request; when they end, it does not come back.
        caller: as the server knows it; ``None``: it can't tell who asks.
    """

    first: float
    thinks: Iterator[float]
    caller: Caller | None = field(default_factory=Caller)


class Arrivals(Protocol):
    """Who makes requests, and when.

    Attributes:
        name: in tables.
        callers: most requests at once; ``None``: there is no such limit.
        closed: each of them always comes back.
        seconds: no request is made later.
        warm_up: requests that are made earlier count for the cold start only.
    """

    @property
    def name(self) -> str: ...

    @property
    def callers(self) -> int | None: ...

    @property
    def closed(self) -> bool: ...

    @property
    def seconds(self) -> float: ...

    @property
    def warm_up(self) -> float: ...

    def clients(self, seed: int, cost: Cost) -> list[Client]:
        """Make the clients of one run; the same seed makes the same."""


@dataclass(frozen=True, slots=True)
class Result:
    """What callers saw. Times are in seconds.

    Attributes:
        requests: answered ones that count.
        latency: mean, from request to reply.
        p50: median latency.
        p99: of 100 requests one takes longer.
        throughput: requests per second.
        batch: rows of a pass, on average.
        cold: mean latency of the requests before the warm-up was over; NaN if there were none.
        unfinished: requests of the whole run without a reply; always 0.
    """

    requests: int
    latency: float
    p50: float
    p99: float
    throughput: float
    batch: float
    cold: float
    unfinished: int


def simulate(
    scheduler: Scheduler,
    trace: Arrivals,
    cost: Cost,
    *,
    seed: int = 0,
    max_batch_size: int = 64,
    transport: float = 0.0,
) -> Result:
    """Serve all requests of a trace.

    Args:
        scheduler: a new one.
        trace: who asks, and when.
        cost: of the forward passes.
        seed: of the think times, the arrivals and the noise of the passes: the same for each scheduler.
        max_batch_size: most rows in one pass; the scheduler should know it, too.
        transport: seconds that a request, or a reply, is on its way.
    """
    end_of_trace = trace.seconds
    noise = Random(f"{seed} passes")
    coming = [(client.first, number, client) for number, client in enumerate(trace.clients(seed, cost))]
    coming = [entry for entry in coming if entry[0] <= end_of_trace]
    heapq.heapify(coming)
    pending: deque[tuple[float, int, Client]] = deque()
    asked = len(coming)
    done: list[tuple[float, float]] = []  # when each request was made, and its latency
    passes = 0
    now = last = 0.0

    def take_until(time: float) -> None:
        while coming and coming[0][0] <= time:
            entry = heapq.heappop(coming)
            caller = entry[2].caller
            if caller is not None:
                caller.asked_at = entry[0]
            pending.append(entry)

    while True:
        take_until(now)
        if not pending:
            if not coming:
                break
            now = coming[0][0]
            take_until(now)
        free_since = now
        while True:
            decision = scheduler.decide(
                now=now,
                pending=len(pending),
                oldest=pending[0][0],
                free_since=free_since,
                draining=now >= end_of_trace,
            )
            if not isinstance(decision, Hold):
                break
            target = len(pending) + decision.rows
            deadline = now + max(decision.seconds, _LEAST_HOLD)
            if deadline > end_of_trace:
                deadline = max(end_of_trace, now)
            while len(pending) < target and coming and coming[0][0] <= deadline:
                now = coming[0][0]
                take_until(now)
            if len(pending) < target:
                now = deadline
        batch = [pending.popleft() for _ in range(min(len(pending), scheduler.batch_size, max_batch_size))]
        rows = len(batch)
        requests = [_Request(client.caller) for _, _, client in batch]
        scheduler.on_batch(requests)
        seconds = cost(rows, noise)
        now += seconds
        passes += 1
        scheduler.on_pass(rows, seconds)
        scheduler.on_replies(requests, [asked_at for asked_at, _, _ in batch], now)
        last = now + transport
        for asked_at, number, client in batch:
            done.append((asked_at - transport, now - asked_at + 2 * transport))
            think = next(client.thinks, None)
            if think is not None and (at := last + think + transport) <= end_of_trace:
                heapq.heappush(coming, (at, number, client))
                asked += 1
    return _result(done, trace.warm_up, last, asked, passes)


def _result(done: list[tuple[float, float]], warm_up: float, last: float, asked: int, passes: int) -> Result:
    latencies = sorted([latency for asked_at, latency in done if asked_at >= warm_up])
    cold = [latency for asked_at, latency in done if asked_at < warm_up]
    count = len(latencies)
    if not count:
        raise ValueError("no request was made after the warm-up")
    return Result(
        requests=count,
        latency=math.fsum(latencies) / count,
        p50=latencies[count // 2],
        p99=latencies[min(count - 1, count * 99 // 100)],
        throughput=count / (last - warm_up),
        batch=len(done) / passes,
        cold=math.fsum(cold) / len(cold) if cold else math.nan,
        unfinished=asked - len(done),
    )
