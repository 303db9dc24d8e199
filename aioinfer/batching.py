"""When a batch leaves, and why: the limits, the rule, and what is learned of callers and of forward passes.

Pure: no clock, no thread, no queue. The model thread passes the time and the counts, and so does the simulator. All
times are in seconds, on any one clock.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

__all__ = [
    "BatchLimits",
    "BatchScheduler",
    "BatchingRule",
    "Caller",
    "DispatchReason",
    "Hold",
    "LeaveWhenFree",
    "PassCost",
    "Review",
    "ScheduledRequest",
    "Situation",
]


# Of the last think times, or passes of one size, the newest counts for so much.
_THINK_TIME_SHARE = 0.2
_PASS_SHARE = 0.1
# One pause says little: a think time counts as at most so many deviations from the mean, a pass as at most so many
# times as long as those of its size.
_UNUSUAL = 6.0
_OUTLIER = 3.0
# A size has been seen often enough for a figure of its own; the others come from a straight line.
_FEW_PASSES = 4
# Passes after which one of another size counts half for that line.
_HALF_LIFE = 1000
# A caller is forgotten until it comes back when it is late by so many deviations of its think time.
_PATIENCE = 4.0
# Seconds by which a caller may always be late: requests are on their way for as long.
_LEAST_DEVIATION = 0.0001
# Seconds; no caller that thinks for longer is waited for, and a time that another process claims may be wrong.
_LONGEST_THINK_TIME = 60.0
# So many callers are known at most, and so many requests of a batch are learned from. Learning takes 1 us for each of
# them: where passes are short, in seconds, only one pass in so many is learned from after the first ones. (31 is not in
# step with callers that take turns in two, three or four batches.)
_MOST_CALLERS = 256
_MOST_SIZES = 128
_LEARNED_REQUESTS = 8
_SHORT_PASS = 0.001
_FIRST_PASSES = 200
_LEARN_EVERY = 31
# Passes from one review to the next, and where passes are short; so many of them come too early to be measured.
_REVIEW_PASSES = 24
_REVIEW_SHORT_PASSES = 192
_SKIPPED_PASSES = 8

_log = logging.getLogger("aioinfer")


class DispatchReason(StrEnum):
    """Why a batch left."""

    FULL = "full"
    """``max_batch_size`` rows were pending."""
    TIMEOUT = "timeout"
    """The oldest request had waited for ``batch_timeout`` seconds."""
    IDLE = "idle"
    """The model was free and ``min_batch_size`` rows were pending."""
    ALL_WAITING = "all_waiting"
    """Every caller was waiting: no further request could come."""
    GATHERED = "gathered"
    """It was held back for callers that were expected, until they had come."""
    OVERDUE = "overdue"
    """It was held back for callers that were expected, and they did not come in time."""
    DRAIN = "drain"
    """The server was shutting down, and served the pending requests."""


class Caller:
    """Who makes one request after the other: when it was last answered, when it came back, and what it usually does.

    The thread that puts its requests sets ``asked_at``, the thread that runs the scheduler everything else.

    Attributes:
        asked_at: when it made its last request.
        answered_at: when the last reply left for it; 0 before the first.
        rows: of its last request that was answered.
        think_time: mean of the seconds from a reply to its next request, as learned; negative before it has come back.
        deviation: mean absolute deviation of the think time, as learned.
        missed_at: the ``answered_at`` after which it did not come back in time; it is not waited for until it does.
    """

    __slots__ = ("answered_at", "asked_at", "deviation", "missed_at", "rows", "think_time")

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.answered_at = 0.0
        self.rows = 1
        self.think_time = -1.0
        self.deviation = 0.0
        self.missed_at = 0.0

    def come_back(self) -> bool:
        """Learn from a request that follows a reply; return whether it does."""
        seconds = self.asked_at - self.answered_at
        if not (self.answered_at > 0.0 <= seconds < _LONGEST_THINK_TIME):
            return False
        if self.think_time < 0:
            self.think_time, self.deviation = seconds, seconds / 2
        else:
            limit = _UNUSUAL * max(self.deviation, _LEAST_DEVIATION)
            error = min(max(seconds - self.think_time, -limit), limit)
            self.think_time += _THINK_TIME_SHARE * error
            self.deviation += _THINK_TIME_SHARE * (abs(error) - self.deviation)
        return True

    def remaining(self, now: float) -> float:
        """Seconds until it is expected back, while it is away."""
        left = self.answered_at + self.think_time - now
        return max(left, self.deviation, _LEAST_DEVIATION)

    def is_missed(self, now: float) -> bool:
        """Whether it is away for so long that it is not waited for any more."""
        patience = _PATIENCE * max(self.deviation, _LEAST_DEVIATION)
        return now - self.answered_at - self.think_time > patience


class ScheduledRequest(Protocol):
    """What a scheduler reads of a request.

    Attributes:
        caller: who made it; ``None`` is a stranger.
        rows: how many it has.
    """

    caller: Caller | None
    rows: int


class PassCost:
    """Seconds that a forward pass takes by its number of rows, as learned.

    For a size that has been seen a few times it is the moving average of that size, for another one that of a straight
    line through all of them: ``fixed + per_row * rows``.
    """

    def __init__(self) -> None:
        self.fixed = 0.0
        """Seconds of a pass, whatever its size, by the straight line."""
        self.per_row = 0.0
        """Seconds of each row, by the straight line."""
        self._sizes: dict[int, _Size] = {}
        self._known = 1, _Size(math.inf)  # the size that was seen last of those that were seen often, if there is one
        self._passes = 0

    def add(self, rows: int, seconds: float) -> None:
        """Learn from a pass that was made."""
        self._passes += 1
        size = self._sizes.get(rows)
        if size is None:
            if len(self._sizes) >= _MOST_SIZES:  # half of them, those that were seen last, are kept
                latest = sorted(self._sizes.items(), key=lambda item: item[1].last_pass)
                self._sizes = dict(latest[_MOST_SIZES // 2 :])
            size = self._sizes[rows] = _Size(seconds)
        elif size.passes >= _FEW_PASSES:
            seconds = min(seconds, _OUTLIER * size.seconds)
        elif size.seconds > _OUTLIER * seconds:  # the passes before have warmed the model up
            size.passes = 0
        size.add(seconds, self._passes)
        if size.passes >= _FEW_PASSES:
            self._known = rows, size
        if self._passes % 8 == 0 or self._passes < 16:
            self._fit()

    def _fit(self) -> None:
        """Least squares over the sizes, the more recently seen ones the more."""
        weight = rows = seconds = squares = products = 0.0
        known_rows, known = self._known
        for count, size in self._sizes.items():
            if size.passes < _FEW_PASSES and size.seconds > _OUTLIER * known.seconds * max(1.0, count / known_rows):
                continue  # it has warmed the model up, and may not be seen again
            share = size.passes * 0.5 ** ((self._passes - size.last_pass) / _HALF_LIFE)
            weight += share
            rows += share * count
            seconds += share * size.seconds
            squares += share * count * count
            products += share * count * size.seconds
        if not weight:
            return
        mean_rows, mean_seconds = rows / weight, seconds / weight
        variance = squares / weight - mean_rows * mean_rows
        slope = (products / weight - mean_rows * mean_seconds) / variance if variance > 0.01 * mean_rows else 0.0
        self.per_row = min(max(slope, 0.0), mean_seconds / mean_rows)
        self.fixed = mean_seconds - self.per_row * mean_rows

    def __call__(self, rows: int) -> float:
        """Seconds that a pass over so many rows takes; 0 before the first pass."""
        size = self._sizes.get(rows)
        return self.fixed + self.per_row * rows if size is None or size.passes < _FEW_PASSES else size.seconds

    def seen(self) -> dict[int, float]:
        """Seconds by number of rows, for the sizes that were seen. Any thread."""
        return {rows: size.seconds for rows, size in sorted(self._sizes.copy().items())}


class _Size:
    """Passes of one size."""

    __slots__ = ("last_pass", "passes", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.passes = 0  # up to the number of those that count
        self.last_pass = 0

    def add(self, seconds: float, number: int) -> None:
        self.passes = min(self.passes + 1, int(1 / _PASS_SHARE))
        self.seconds += (seconds - self.seconds) / self.passes
        self.last_pass = number


@dataclass(slots=True)
class Situation:
    """What a rule may know when the model is free.

    Attributes:
        now: the time.
        pending: rows that wait, fewer than ``max_batch_size``.
        oldest: when the oldest of them was submitted.
        free_since: since when the model is free and requests are pending.
        max_batch_size: most rows in one forward pass.
        away: callers that have their replies and are expected back, in no order; of those whose think times vary by no
            more than a pass.
        cost: seconds that a pass takes by its number of rows.
    """

    now: float
    pending: int
    oldest: float
    free_since: float
    max_batch_size: int
    away: Sequence[Caller]
    cost: PassCost


class Hold(NamedTuple):
    """A batch is held back.

    Attributes:
        rows: until so many more rows are pending,
        seconds: or so much time has passed; then the rule is asked again.
    """

    rows: int
    seconds: float


class Review(NamedTuple):
    """How the batches of late went.

    Attributes:
        callers: that come back, as far as it is known.
        latency: seconds from a request to its reply, on average; ``None`` if there were none.
        rate: rows that passes were made over in a second.
        max_batch_size: most rows in one forward pass.
        cost: seconds that a pass takes by its number of rows.
    """

    callers: Sequence[Caller]
    latency: float | None
    rate: float
    max_batch_size: int
    cost: PassCost


class BatchingRule(ABC):
    """Decides whether a batch that may leave is held back for more requests.

    The thread of one server asks it. What it raises is logged once, and the batch leaves.
    """

    batch_size: int | None = None
    """Most rows of the batch that leaves next, where its first request has no more; ``None``: ``max_batch_size``."""
    always_asked: bool = True
    """Whether it is asked also while no caller is expected back."""

    @abstractmethod
    def hold(self, situation: Situation) -> Hold | None:
        """Say for what the batch is held back; ``None``: it leaves now.

        Asked each time the model is free and ``min_batch_size <= pending < max_batch_size``, and again when a hold is
        over. The server ends a hold ``batch_timeout`` seconds after the model became free, whatever the rule says.
        """

    def review(self, review: Review) -> None:  # noqa: B027 - most rules learn nothing
        """Take note of how the last passes went; called once in a while between two batches."""


class LeaveWhenFree(BatchingRule):
    """Never hold a batch back."""

    always_asked = False

    def hold(self, situation: Situation) -> Hold | None:
        return None


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What holds for every batch, whatever the rule.

    Args:
        max_batch_size: most rows in one forward pass.
        min_batch_size: gather until this many are pending, or ``timeout`` passes.
        timeout: seconds a partial batch may wait, counted from its oldest request.

    Raises:
        TypeError: a size is no integer, or ``timeout`` no number.
        ValueError: not ``1 <= min_batch_size <= max_batch_size``, or not ``0 <= timeout``.
    """

    max_batch_size: int = 64
    min_batch_size: int = 1
    timeout: float = 0.01

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "min_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool):
            raise TypeError(f"batch_timeout must be a number of seconds, got {self.timeout!r}")
        if not 1 <= self.min_batch_size <= self.max_batch_size:
            raise ValueError(
                "batch sizes must satisfy 1 <= min_batch_size <= max_batch_size, "
                f"got min_batch_size={self.min_batch_size} and max_batch_size={self.max_batch_size}"
            )
        if not self.timeout >= 0:
            raise ValueError(f"batch_timeout must be at least 0 seconds, got {self.timeout!r}")

    def decide(
        self, *, pending: int, waited: float, callers: int | None = None, draining: bool = False
    ) -> DispatchReason | None:
        """Say whether a batch may leave now.

        Args:
            pending: rows that wait, at least 1.
            waited: seconds since the oldest request was submitted.
            callers: how many requests could be pending at most, where the transport knows it.
            draining: no further request will come.

        Returns:
            The reason, or ``None``: wait for more, at most ``timeout - waited`` seconds.
        """
        if pending >= self.max_batch_size:
            return DispatchReason.FULL
        if draining:
            return DispatchReason.DRAIN
        if pending >= self.min_batch_size:
            return DispatchReason.IDLE
        if callers is not None and pending >= callers:
            return DispatchReason.ALL_WAITING
        if waited >= self.timeout:
            return DispatchReason.TIMEOUT
        return None

    def wanted(self, callers: int | None) -> int:
        """How many pending rows end the gathering of a partial batch."""
        return self.min_batch_size if callers is None else max(1, min(self.min_batch_size, callers))


class BatchScheduler:
    """Limits, rule, and what is learned: says when a batch leaves. One thread uses it.

    Args:
        limits: hold for every batch.
        rule: holds batches back within them.
    """

    def __init__(self, limits: BatchLimits, rule: BatchingRule) -> None:
        self.limits = limits
        self.rule = rule
        self.cost = PassCost()
        self.held_since: float | None = None
        """Since when the batch that will leave next is held back, or gathers; ``None`` if it is not."""
        self._callers: dict[Caller, None] = {}  # that come back
        self._regular: list[Caller] = []  # those of them whose return can be told to within a pass
        self._rows = 0  # of the requests of these together
        self._target = 0  # pending rows that end the hold under way; 0: there is none
        self._passes = self._reviewed = 0
        self._latency = 0.0  # of all requests since the last review together
        self._measured = 0  # how many they are
        self._served = 0  # rows of all passes since the last review
        self._reviewed_at = 0.0
        self._learn_every, self._review_every = 1, _REVIEW_PASSES
        self.is_learning = True
        """Whether the next batch is learned from: else ``on_batch`` need not be called."""
        self._strangers = False  # whether there were any since the last review
        self._always_asks = rule.always_asked
        self._warned = False

    @property
    def batch_size(self) -> int:
        """Most rows of the batch that leaves now."""
        most = self.limits.max_batch_size
        try:
            chosen = self.rule.batch_size
            return most if chosen is None else max(1, int(min(chosen, most)))
        except Exception:  # of a user's rule
            self._warn()
            return most

    def think_times(self) -> list[float]:
        """Of each caller that comes back, the think time in seconds. Any thread."""
        return [caller.think_time for caller in self._callers.copy()]

    def decide(
        self,
        *,
        now: float,
        pending: int,
        oldest: float,
        free_since: float,
        callers: int | None = None,
        draining: bool = False,
    ) -> DispatchReason | Hold:
        """Say whether a batch leaves now, and why, or for what it is held back.

        Args:
            now: the time.
            pending: rows that wait, at least 1.
            oldest: when the oldest request was submitted.
            free_since: since when the model is free and requests are pending.
            callers: how many requests could be pending at most, where the transports know it.
            draining: no further request will come.
        """
        limits = self.limits
        if self.held_since is not None and oldest > self.held_since:  # those that were held are gone
            self.held_since, self._target = None, 0
        target = self._target
        if draining or not limits.min_batch_size <= pending < limits.max_batch_size:
            reason = limits.decide(pending=pending, waited=now - oldest, callers=callers, draining=draining)
            if reason is None:
                self.held_since = self.held_since or now
                return Hold(limits.wanted(callers) - pending, oldest + limits.timeout - now)
            return reason
        if not target and not self._always_asks and not self._strangers and pending >= self._rows:
            return DispatchReason.IDLE  # nobody else is known
        left = free_since + limits.timeout - now
        if left <= 0:
            return DispatchReason.TIMEOUT if target else DispatchReason.IDLE
        hold = self._hold(now, pending, oldest, free_since, left)
        if hold is not None:
            self.held_since = self.held_since or now
            self._target = pending + hold.rows
            return hold
        if not target:
            return DispatchReason.IDLE
        return DispatchReason.GATHERED if pending >= target else DispatchReason.OVERDUE

    def _hold(self, now: float, pending: int, oldest: float, free_since: float, left: float) -> Hold | None:
        away = [caller for caller in self._regular if caller.missed_at != caller.answered_at > caller.asked_at]
        for caller in away:
            if caller.is_missed(now):
                caller.missed_at = caller.answered_at
        if not away and not self._always_asks:
            return None
        situation = Situation(
            now=now,
            pending=pending,
            oldest=oldest,
            free_since=free_since,
            max_batch_size=self.limits.max_batch_size,
            away=[caller for caller in away if caller.missed_at != caller.answered_at],
            cost=self.cost,
        )
        try:
            hold = self.rule.hold(situation)
            if hold is None or not (hold.rows > 0 and hold.seconds > 0):
                return None
            return Hold(min(hold.rows, self.limits.max_batch_size - pending), min(hold.seconds, left))
        except Exception:  # of a user's rule: it must not end the server
            self._warn()
            return None

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            _log.exception("%s raised; batches leave when the model is free. This is said once", type(self.rule))

    def on_batch(self, requests: Sequence[ScheduledRequest]) -> None:
        """Learn from requests that were taken into a batch: from a few of them, and not in each batch."""
        if not self.is_learning:
            return
        passes = self._passes
        step = 1 + (len(requests) - 1) // _LEARNED_REQUESTS
        for request in requests[passes // step % step :: step]:
            caller = request.caller
            if caller is not None and caller.come_back() and len(self._callers) < _MOST_CALLERS:
                if caller in self._callers:
                    self._rows += request.rows - caller.rows
                else:
                    self._rows += request.rows
                    self._callers[caller] = None
                    self._regular.append(caller)
                caller.rows = request.rows

    def on_pass(self, rows: int, seconds: float) -> None:
        """Learn from a forward pass, once in a while."""
        self._passes = passes = self._passes + 1
        self._served += rows
        if self.is_learning:
            self.cost.add(rows, seconds)
        self.is_learning = passes % self._learn_every == 0

    def on_replies(self, requests: Sequence[ScheduledRequest], submitted_at: Sequence[float], now: float) -> None:
        """Note that replies are about to leave.

        Args:
            requests: that are answered.
            submitted_at: when each was made.
            now: the time.
        """
        for request, asked_at in zip(requests, submitted_at, strict=True):
            caller = request.caller
            if caller is None:
                self._strangers = True
            elif caller.asked_at == asked_at:  # else it waits for a later one
                caller.answered_at = now
        self.held_since, self._target = None, 0
        number = self._passes % self._review_every
        if number == 0 or (number >= _SKIPPED_PASSES and len(self._callers) > 1):
            self._measured += len(requests)
            self._latency += len(requests) * now - sum(submitted_at)
            # Of many callers, each should have been answered once, more or less, since the last review.
            if number == 0 and self._passes > self._reviewed and 2 * self._measured >= len(self._callers):
                self._review(now)

    def _review(self, now: float) -> None:
        latency = self._latency / self._measured if self._measured else None
        self._latency, self._measured, self._strangers = 0.0, 0, False
        last = self._reviewed_at
        rate = self._served / (now - last) if now > last else 0.0
        self._reviewed, self._reviewed_at, self._served = self._passes, now, 0
        for caller in tuple(self._callers):
            # What other processes asked during the last pass was not read yet: only who is away for longer is missed.
            if caller.asked_at < caller.answered_at < last and caller.is_missed(now):
                del self._callers[caller]
        longest = self.cost(self.limits.max_batch_size)
        self._regular = [caller for caller in self._callers if caller.deviation < longest]
        self._rows = sum([caller.rows for caller in self._regular])
        is_short = self._passes >= _FIRST_PASSES and self.cost.fixed < _SHORT_PASS
        self._learn_every = _LEARN_EVERY if is_short else 1
        self._review_every = _REVIEW_SHORT_PASSES if is_short else _REVIEW_PASSES
        try:
            self.rule.review(Review(tuple(self._callers), latency, rate, self.limits.max_batch_size, self.cost))
        except Exception:  # of a user's rule
            self._warn()
