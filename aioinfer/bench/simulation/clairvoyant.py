"""Schedules of a clairvoyant: it knows all think times, arrivals and costs ahead, and searches for the best holds."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeAlias

from aioinfer.bench.simulation.costs import Cost
from aioinfer.bench.simulation.rules import FixedScheduler
from aioinfer.bench.simulation.simulator import Arrivals

__all__ = ["ReplayScheduler", "search"]

_Request: TypeAlias = tuple[float, int, int]  # when it is made, by which client, and how many it made before


class _Path(NamedTuple):
    """The passes of a schedule, the last first."""

    rows: int
    before: _Path | None


@dataclass(slots=True)
class _State:
    """The model is free at ``time``; of the first requests of clients, so many have been ``taken``."""

    time: float
    regret: float  # sum over the replies of latency minus the mean that is expected
    taken: int
    coming: list[_Request]  # of clients that have been answered, sorted
    pending: list[_Request]
    passes: int
    path: _Path | None


class _Search:
    def __init__(self, trace: Arrivals, cost: Cost, seed: int, max_batch_size: int, latency: float) -> None:
        clients = trace.clients(seed, cost)
        self._end = trace.seconds
        self._cost = cost
        self._most = max_batch_size
        self._latency = latency
        self._random = Random(f"{seed} passes")
        self._noise: list[float] = []
        self._thinks: list[Iterator[float]] = [client.thinks for client in clients]
        self._drawn: list[list[float]] = [[] for _ in clients]
        self._first = sorted(
            [(client.first, number, 0) for number, client in enumerate(clients) if client.first <= self._end]
        )

    def _noise_of(self, number: int) -> float:
        while len(self._noise) <= number:
            self._noise.append(self._cost.noise(self._random))
        return self._noise[number]

    def _next(self, replied: float, request: _Request) -> _Request | None:
        _, client, made = request
        drawn = self._drawn[client]
        if len(drawn) <= made:
            think = next(self._thinks[client], None)
            drawn.append(-1.0 if think is None else think)
        think = drawn[made]
        at = replied + think
        return None if think < 0 or at > self._end else (at, client, made + 1)

    def start(self) -> _State:
        return _State(0.0, 0.0, 0, [], [], 0, None)

    def successors(self, state: _State) -> Iterator[_State]:
        """Yield states by the number of requests with which the next pass leaves: each, or every eighth of many."""
        first, taken, coming, read, now = self._first, state.taken, state.coming, 0, state.time
        pending = list(state.pending)
        longest: float | None = None
        enough = 1
        while True:
            if len(pending) >= enough:
                yield self._leave(state, now, pending, taken, coming[read:])
                enough = min(len(pending) + max(1, len(pending) // 8), self._most)
                if len(pending) >= self._most or now >= self._end:
                    return
            if taken < len(first) and (read >= len(coming) or first[taken][0] <= coming[read][0]):
                now = first[taken][0]
            elif read < len(coming):
                now = coming[read][0]
            else:
                return
            if longest is None:
                longest = (state.time if pending else now) + 1.5 * self._cost.mean(max(len(pending), 1) + 8)
            if pending and now > longest:
                return
            while taken < len(first) and first[taken][0] <= now:
                pending.append(first[taken])
                taken += 1
            while read < len(coming) and coming[read][0] <= now:
                pending.append(coming[read])
                read += 1

    def _leave(self, state: _State, now: float, pending: list[_Request], taken: int, coming: list[_Request]) -> _State:
        batch, left = pending[: self._most], pending[self._most :]
        rows = len(batch)
        end = now + self._cost.mean(rows) * self._noise_of(state.passes)
        regret = state.regret + rows * (end - self._latency) - sum([request[0] for request in batch])
        coming += [asked for request in batch if (asked := self._next(end, request)) is not None]
        coming.sort()
        arrived = bisect_right(coming, (end, len(self._drawn), 0))
        first = self._first
        while taken < len(first) and first[taken][0] <= end:
            left.append(first[taken])
            taken += 1
        left += coming[:arrived]
        left.sort()
        return _State(end, regret, taken, coming[arrived:], left, state.passes + 1, _Path(len(pending), state.path))

    def score(self, state: _State) -> float:
        """Return the regret, with that of the pending requests if they left now."""
        rows = len(state.pending)
        if not rows:
            return state.regret
        passes = -(-rows // self._most)
        cost = self._cost.mean(min(rows, self._most)) * (passes + 1) / 2
        asked = sum([request[0] for request in state.pending])
        return state.regret + rows * (state.time + cost - self._latency) - asked


def search(
    trace: Arrivals, cost: Cost, *, seed: int, max_batch_size: int, latency: float, width: int = 32
) -> list[int]:
    """Search for the schedule of the least mean latency.

    A beam search over states at the ends of passes: in each slice of time, shorter than a pass, the best states are
    kept. So it is a policy, not a bound: a wider beam may find a better one.

    Args:
        trace: who asks, and when.
        cost: of the forward passes.
        seed: as in ``simulate``.
        max_batch_size: most rows in one pass.
        latency: about the mean latency that will be found.
        width: states that are kept.

    Returns:
        With how many pending requests each pass leaves, for ``ReplayScheduler``.
    """
    space = _Search(trace, cost, seed, max_batch_size, latency)
    slice_ = max(cost.mean(1) / 2, latency / 8)
    slices: dict[int, list[_State]] = {0: [space.start()]}
    order = [0]
    last: list[_State] = []
    while order:
        states = slices.pop(heapq.heappop(order))
        kept: dict[tuple[float, int], float] = {}
        scored = sorted([(space.score(state), number) for number, state in enumerate(states)])
        count = 0
        for score, number in scored:
            state = states[number]
            key = (state.time, len(state.pending))
            if kept.setdefault(key, score) < score - 1e-12 or count >= width:
                continue
            count += 1
            ended = True
            for after in space.successors(state):
                ended = False
                index = int(after.time / slice_)
                if index not in slices:
                    slices[index] = []
                    heapq.heappush(order, index)
                slices[index].append(after)
            if ended:
                last.append(state)
    best = min(last, key=lambda state: state.regret)
    rows: list[int] = []
    path = best.path
    while path is not None:
        rows.append(path.rows)
        path = path.before
    return rows[::-1]


class ReplayScheduler(FixedScheduler):
    """Leave as a schedule says: pass i with so many pending requests."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows[0], 1e9)
        self._rows = iter(rows[1:])

    def on_pass(self, rows: int, seconds: float) -> None:
        """Go on to the next."""
        self.size = next(self._rows, 1)
