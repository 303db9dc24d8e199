"""Lower bounds of the mean latency that no policy can beat, a clairvoyant one neither."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import islice

from aioinfer.bench.simulation.costs import Cost
from aioinfer.bench.simulation.simulator import Arrivals

__all__ = ["latency_bound", "relaxed_latency", "size_bound"]


def latency_bound(trace: Arrivals, cost: Cost, *, seed: int, max_batch_size: int) -> float:
    """Return the larger one of the bounds that hold for the trace: ``relaxed_latency`` and ``size_bound``."""
    most = max_batch_size if trace.callers is None else min(max_batch_size, trace.callers)
    bound = relaxed_latency(trace, cost, seed=seed, most=most)
    if trace.callers is not None and trace.closed:
        thinks = []
        for client in trace.clients(seed, cost):
            times, total = [], 0.0
            for think in islice(client.thinks, 100_000):
                times.append(think)
                total += think + cost.mean(1)
                if total > trace.seconds:
                    break
            thinks.append(math.fsum(times) / len(times))
        bound = max(bound, size_bound(thinks, cost, most))
    return bound


def relaxed_latency(trace: Arrivals, cost: Cost, *, seed: int, most: int) -> float:
    """Serve the trace with a server that no real one is faster than, and return the mean latency.

    Each request takes as long as a pass of one row; all together leave at most at the rate of the passes that serve
    most requests per second. Nobody waits for others. Noise of the passes is left out: it has the mean 1.
    """
    alone, gap = cost.mean(1), 1 / cost.capacity(most)
    clients = trace.clients(seed, cost)
    coming = [(client.first, number) for number, client in enumerate(clients) if client.first <= trace.seconds]
    heapq.heapify(coming)
    last = 0.0
    latencies = []
    while coming:
        asked_at, number = heapq.heappop(coming)
        last = max(asked_at + alone, last + gap)
        if asked_at >= trace.warm_up:
            latencies.append(last - asked_at)
        think = next(clients[number].thinks, None)
        if think is not None and last + think <= trace.seconds:
            heapq.heappush(coming, (last + think, number))
    return math.fsum(latencies) / len(latencies)


def size_bound(thinks: Sequence[float], cost: Cost, most: int) -> float:
    """Bound the mean latency of a closed loop by the size that the batches must have.

    With a throughput ``X`` the mean latency is ``(N - sum(x_i * think_i)) / X`` (Little's law), where caller i makes
    ``x_i <= 1 / (think_i + T(1))`` requests per second; and at least that of the cheapest mix of batch sizes that
    serves ``X`` with a model that is never idle. The first falls with ``X``, the second rises.

    Args:
        thinks: mean think time of each caller.
        cost: of the forward passes.
        most: the largest batch.
    """
    slow_first = sorted(thinks, reverse=True)
    rates = [1 / (think + cost.mean(1)) for think in slow_first]

    def by_little(throughput: float) -> float:
        thinking, left = 0.0, throughput
        for think, rate in zip(slow_first, rates, strict=True):
            thinking += think * min(rate, left)
            left -= min(rate, left)
        return (len(thinks) - thinking) / throughput

    low, high = 0.0, min(math.fsum(rates), cost.capacity(most))
    if by_little(high) >= _service(high, cost, most):
        return by_little(high)
    for _ in range(60):
        middle = (low + high) / 2
        if by_little(middle) > _service(middle, cost, most):
            low = middle
        else:
            high = middle
    return by_little(high)


def _service(throughput: float, cost: Cost, most: int) -> float:
    """Least mean of ``T(n)`` over requests, in a mix of sizes with a mean of ``T(n) / n`` of at most 1 / throughput.

    A linear program of one constraint: the best mix has at most two sizes.
    """
    sizes = [(cost.mean(n), cost.mean(n) / n - 1 / throughput) for n in range(1, most + 1)]
    feasible = [one for one in sizes if one[1] <= 1e-12]
    best = min([seconds for seconds, _ in feasible], default=math.inf)
    for few, over in sizes:
        if over > 0:
            for many, under in feasible:
                if under < 0:
                    share = over / (over - under)  # of the larger size
                    best = min(best, few + share * (many - few))
    return best
