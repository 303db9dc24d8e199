"""The rule that servers have: hold a batch back while the requests that are expected save more than waiting costs."""

from __future__ import annotations

import math
from collections import deque
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
# Seconds of a pass below which no batch size is chosen.
_SHORT_PASS = 0.001
# Callers take turns in at most so many batches, and only where the passes of all groups together take so many times as
# long as a group is away.
_MOST_TURNS = 4
_BUSY = 1.25
# And only where the requests of all callers are at most so many times as many as such batches carry, as measured.
_SPARE = 1.1
# Reviews after which what was measured is forgotten, and reviews without a change before anything is tried.
_FORGOTTEN = 64
_SETTLED = 3
# Callers that were there in one of so many reviews count.
_REMEMBERED = 8
# The number of callers has changed if it did so by this share.
_CHANGED = 0.2
# Batch sizes are chosen for callers that think for less than so many passes, if so much of all requests is theirs.
_SLOW = 2.0
_MOST_REQUESTS = 0.8
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

    always_asked = False

    def __init__(self) -> None:
        self._counts: deque[int] = deque(maxlen=_REMEMBERED)  # of callers, at the last reviews
        self._settled_count = 0  # how many callers there were when their number has changed
        self._settled = 0  # reviews since then
        self._reviews = 0
        self._turns = 0  # in how many batches callers take turns now; 0: decide one pass ahead
        self._gathered = 0  # how many rows such a batch has
        self._measured: dict[int, tuple[float, int]] = {}  # by turns: the latency, and at which review

    # -- for each batch --------------------------------------------------------------------------------

    def hold(self, situation: Situation) -> Hold | None:
        away, now = situation.away, situation.now
        missing = self._gathered - situation.pending
        if missing > 0:
            rows = 0
            for seconds, more in sorted([(caller.remaining(now), caller.rows) for caller in away]):
                rows += more
                if seconds > _SLOW * situation.cost(self._gathered):  # the batch was chosen for others
                    break
                if rows >= missing:
                    return Hold(missing, seconds)
        return _best_hold(situation)

    # -- from time to time -----------------------------------------------------------------------------

    def review(self, review: Review) -> None:
        self._reviews += 1
        cost, most = review.cost, review.max_batch_size
        callers = _fast(review)
        self._counts.append(len(callers))
        count = max(self._counts)
        self._settled += 1
        if abs(count - self._settled_count) > _CHANGED * self._settled_count:
            self._settled_count, self._settled = count, 0
            self._measured.clear()
        if review.latency is not None:
            self._measured[self._turns] = review.latency, self._reviews
        expected = {
            turns: latency
            for turns, latency in estimates(callers, count, cost, most).items()
            if turns == 1 or self._carries(review.rate, _rows(-(-count // turns), callers), cost)
        }
        measured = {
            turns: latency
            for turns, (latency, at) in self._measured.items()
            if turns in (0, self._turns, *expected) and (turns == self._turns or self._reviews - at < _FORGOTTEN)
        }
        self._measured = {turns: self._measured[turns] for turns in measured}
        if self._settled < _SETTLED:
            expected = {}
        self._choose(measured, expected)
        size = _rows(-(-count // self._turns), callers) if self._turns else 0
        self._gathered = size if 1 < size <= most else 0
        self.batch_size = self._gathered if self._gathered and self._turns > 1 else None

    @staticmethod
    def _carries(rate: float, rows: int, cost: PassCost) -> bool:
        """Whether batches of so many rows are enough for all requests: those of unknown callers too."""
        return _SPARE * rows >= rate * _at_best(cost, rows)

    def _choose(self, measured: dict[int, float], expected: dict[int, float]) -> None:
        """Choose by what was measured, and where nothing was by what is expected."""
        latencies = {0: 0.0}  # is tried first
        for turns, latency in expected.items():
            latencies[turns] = latency / (_TRIED_ALL if turns == 1 else _TRIED_TURNS)
        latencies |= measured
        best = min(latencies, key=lambda turns: latencies[turns])
        if latencies[best] < _BETTER * latencies.get(self._turns, math.inf):
            self._turns = best


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


def _fast(review: Review) -> Sequence[Caller]:
    """The callers that don't think for long beside a pass, if most of the requests are theirs.

    There are none where passes are short: what the callers themselves do then decides how long a request takes, and a
    measurement over some of these passes says little.
    """
    seconds = review.cost(min(max(1, len(review.callers)), review.max_batch_size))
    if seconds < _SHORT_PASS:
        return ()
    fast = [caller for caller in review.callers if caller.think_time <= _SLOW * seconds]
    rates = [sum([1 / (seconds + caller.think_time) for caller in callers]) for callers in (fast, review.callers)]
    return fast if rates[0] >= _MOST_REQUESTS * rates[1] else ()


def estimates(callers: Sequence[Caller], count: int, cost: PassCost, max_batch_size: int) -> dict[int, float]:
    """The mean latency in seconds of callers that are served in one batch, or take turns in two, three or four.

    In one batch all of them wait for the last to come back. In several, each group thinks while the others are
    served, so that the model never rests; this is estimated only where thinking is short enough for that, and with
    the least that a pass of a size can take that was not seen yet.

    Args:
        callers: that are known now.
        count: how many there are, with those that are away for longer.
        cost: seconds that a pass takes by its number of rows.
        max_batch_size: most rows in one forward pass.
    """
    if not callers or count < 2:
        return {}
    think_time = sum([caller.think_time for caller in callers]) / len(callers)
    latencies: dict[int, float] = {}
    if _rows(count, callers) <= max_batch_size:
        doublings = math.log2(count)
        last = max([caller.think_time + _SPREAD * doublings * caller.deviation for caller in callers])
        latencies[1] = last + cost(_rows(count, callers)) - think_time
    for turns in range(2, _MOST_TURNS + 1):
        size = -(-count // turns)
        rows = _rows(size, callers)
        seconds = _at_best(cost, rows)
        period = count / size * seconds
        if size > 1 and rows <= max_batch_size and period >= _BUSY * (think_time + seconds):
            latencies[turns] = period - think_time
    return latencies


def _rows(count: int, callers: Sequence[Caller]) -> int:
    """How many rows so many of these callers have, on average."""
    return math.ceil(count * sum([caller.rows for caller in callers]) / max(1, len(callers)))


def _at_best(cost: PassCost, rows: int) -> float:
    """Seconds that a pass takes, if steps come as late as they can: as long as one of a somewhat smaller size."""
    seen = cost.seen()
    smaller = [count for count in seen if rows / 2 <= count < rows]
    return cost(rows) if rows in seen or not smaller else min(cost(rows), seen[max(smaller)])
