"""The rule that servers have: hold a batch back while the requests that are expected save more than waiting costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from aioinfer.batching import BatchingRule, Caller, Hold, PassCost, Review, Situation

__all__ = ["LearnedRule"]

# A batch size is tried where it should save so much of the latency that was measured: one batch of all callers, or
# several batches that take turns.
_TRIED_ALL = 0.95
_TRIED_TURNS = 0.88
# It is kept while it is so much better than the others.
_BETTER = 0.97
# Callers take turns in at most so many batches.
_MOST_TURNS = 4
# Reviews after which what was measured is forgotten, and reviews without a change before anything is tried.
_FORGOTTEN = 64
_SETTLED = 2
# The number of callers has changed if it did so by this share.
_CHANGED = 0.2
# Callers that think for so many passes are not waited for by a batch size.
_SLOW = 2.0
# Of callers whose think times vary, the last one of n comes back later than the mean by so many deviations for each
# doubling of n.
_SPREAD = 0.7


class LearnedRule(BatchingRule):
    """Hold a batch back while the requests that are expected save more than the waiting costs.

    **One pass ahead.** Let ``n`` rows be pending, ``k`` more expected within ``w`` seconds, and a pass over ``n`` rows
    take ``T(n)``. The latencies of all of them together are ``n T(n) + k (T(n) + T(k))`` if the ``n`` leave now and the
    ``k`` with the next pass, and ``(n + k) (w + T(n + k))`` if they leave together. The ``k`` that saves most is waited
    for, if any does. (The rest, such as the time until the ``k`` come, is the same in both cases.)

    **Steady states.** Callers that think for as long as each other stay together once they have met, so that waiting
    once saves time in each pass from then on. And groups that don't fit their model stay apart: passes that take a
    step at each multiple of 16 rows, say. One pass ahead doesn't see that. So from time to time the latency is
    estimated that batches of all callers, of half of them, a third and a quarter would have; one that promises to be
    better than what was measured is tried for a while, and kept only if it measures better.
    """

    def __init__(self) -> None:
        self._all = 0  # how many callers there were at the last review
        self._settled = 0  # reviews since their number has changed
        self._reviews = 0
        self._measured: dict[int | None, tuple[float, int]] = {}  # by batch size: the latency, and at which review

    # -- for each batch --------------------------------------------------------------------------------

    def hold(self, situation: Situation) -> Hold | None:
        pending, away, now = situation.pending, situation.away, situation.now
        if not away:
            return None
        missing = 0 if self._gathered is None else self._gathered - pending
        if 0 < missing <= len(away):
            return Hold(missing, sorted([caller.remaining(now) for caller in away])[missing - 1])
        return _best_hold(situation)

    _gathered: int | None = None
    """The batch size for which callers are waited; ``None``: decide one pass ahead."""

    # -- from time to time -----------------------------------------------------------------------------

    def review(self, review: Review) -> None:
        self._reviews += 1
        cost = review.cost
        slow = _SLOW * cost(min(max(1, len(review.callers)), review.max_batch_size))
        callers = [caller for caller in review.callers if caller.think_time <= slow]
        count = len(callers)
        if abs(count - self._all) > _CHANGED * self._all:
            self._all, self._settled = count, 0
            self._measured.clear()
        self._settled += 1
        if review.latency is not None:
            self._measured[self._gathered] = review.latency, self._reviews
        expected = estimates(callers, cost, review.max_batch_size)
        known = {
            size: latency
            for size, (latency, at) in self._measured.items()
            if (size is None or size in expected) and (size == self._gathered or self._reviews - at < _FORGOTTEN)
        }
        self._measured = {size: self._measured[size] for size in known}
        self._choose(known, expected if self._settled > _SETTLED else {}, count)

    def _choose(self, measured: dict[int | None, float], expected: dict[int, float], count: int) -> None:
        """Choose a batch size by what was measured, and for those that were not by what is expected."""
        latencies: dict[int | None, float] = {None: measured.get(None, 0.0)}  # first, if it was not measured
        latencies |= {
            size: latency / (_TRIED_ALL if size == count else _TRIED_TURNS) for size, latency in expected.items()
        }
        latencies |= measured
        if self._gathered not in latencies:
            self._gathered = None
        best = min(latencies, key=lambda size: latencies[size])
        if latencies[best] < _BETTER * latencies[self._gathered]:
            self._gathered = best
        takes_turns = self._gathered is not None and self._gathered < count
        self.batch_size = self._gathered if takes_turns else None


def _best_hold(situation: Situation) -> Hold | None:
    """Look one pass ahead."""
    n, cost, now = situation.pending, situation.cost, situation.now
    most = situation.max_batch_size - n
    now_alone = cost(n)
    # To wait for k saves less than k T(k) / (n + k).
    limit = cost(situation.max_batch_size)
    coming = sorted([(left, caller.rows) for caller in situation.away if (left := caller.remaining(now)) < limit])
    best, saved = None, 0.0
    for (seconds, _), k in zip(coming, accumulate([rows for _, rows in coming]), strict=True):
        if k > most:
            break
        gain = n * now_alone + k * (now_alone + cost(k)) - (n + k) * (seconds + cost(n + k))
        if gain > saved:
            best, saved = Hold(k, seconds), gain
    return best


def estimates(callers: Sequence[Caller], cost: PassCost, max_batch_size: int) -> dict[int, float]:
    """The mean latency in seconds that batches of all callers, half, a third and a quarter of them would have.

    In one batch all of them wait for the last to come back. In several, each group thinks while the others are
    served, so that the model never rests; this is estimated only where thinking is short enough for that, and with
    the least that a pass of a size can take that was not seen yet.
    """
    count = len(callers)
    if count < 2:
        return {}
    think_time = sum([caller.think_time for caller in callers]) / count
    latencies: dict[int, float] = {}
    for turns in range(_MOST_TURNS, 1, -1):
        size = -(-count // turns)
        seconds = _at_best(cost, size)
        period = count / size * seconds
        if 1 < size <= max_batch_size and period >= think_time + seconds:
            latencies[size] = period - think_time
    if count <= max_batch_size:
        doublings = math.log2(count)
        last = max([caller.think_time + _SPREAD * doublings * caller.deviation for caller in callers])
        latencies[count] = last + cost(count) - think_time
    return latencies


def _at_best(cost: PassCost, rows: int) -> float:
    """Seconds that a pass takes, if steps come as late as they can: as long as one of a somewhat smaller size."""
    seen = cost.seen()
    smaller = [count for count in seen if rows / 2 <= count < rows]
    return cost(rows) if rows in seen or not smaller else min(cost(rows), seen[max(smaller)])
