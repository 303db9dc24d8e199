"""When a batch leaves, and why: the limits, the rule, and what is learned of callers and of forward passes.

Pure: no clock, no thread, no queue. The model thread passes the time and the counts, and so does the simulator. All
times are in seconds, on any one clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

__all__ = [
    "BatchLimits",
    "BatchScheduler",
    "BatchingRule",
    "Caller",
    "DispatchReason",
    "Hold",
    "LearnedRule",
    "LeaveWhenFree",
    "PassCost",
    "Situation",
]


# Of a pass or a think time, what is learned keeps so much when the next one comes.
_KEEP = 0.95
_LEARN = 0.2
# After so many passes, one that takes so many times as long as expected counts as one that takes so much.
_FEW_PASSES = 4.0
_OUTLIER = 3.0
# A caller is forgotten until it comes back when it is late by so many deviations of its think time.
_PATIENCE = 4.0


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
        think_time: seconds from a reply to its next request, as learned; negative before it has come back.
        deviation: mean absolute deviation of the think time, as learned.
    """

    __slots__ = ("answered_at", "asked_at", "deviation", "expected", "rows", "think_time")

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.answered_at = 0.0
        self.rows = 1
        self.think_time = -1.0
        self.deviation = 0.0
        self.expected = True

    @property
    def away(self) -> bool:
        """Whether it has its reply and has not come back."""
        return self.answered_at > self.asked_at


class PassCost:
    """Seconds that a forward pass takes by its number of rows, as learned: about ``a + b * rows``."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_squared = self._rows_seconds = 0.0
        self.fixed = 0.0
        """Seconds of a pass, whatever its size: ``a``."""
        self.per_row = 0.0
        """Seconds of each row: ``b``."""

    def add(self, rows: int, seconds: float) -> None:
        """Learn from a pass that was made: least squares over the last passes, the later the more."""
        if self._weight > _FEW_PASSES:  # a pass that something else disturbed says little
            seconds = min(seconds, _OUTLIER * self(rows))
        self._weight = self._weight * _KEEP + 1.0
        self._rows = self._rows * _KEEP + rows
        self._seconds = self._seconds * _KEEP + seconds
        self._rows_squared = self._rows_squared * _KEEP + rows * rows
        self._rows_seconds = self._rows_seconds * _KEEP + rows * seconds
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_squared / self._weight - mean_rows * mean_rows
        slope = 0.0
        if variance > 0.01 * mean_rows:
            slope = (self._rows_seconds / self._weight - mean_rows * mean_seconds) / variance
        self.per_row = min(max(slope, 0.0), mean_seconds / mean_rows)
        self.fixed = mean_seconds - self.per_row * mean_rows

    def __call__(self, rows: int) -> float:
        """Seconds that a pass over so many rows takes; 0 before the first."""
        return self.fixed + self.per_row * rows


@dataclass(slots=True)
class Situation:
    """What a rule may know when the model is free.

    Attributes:
        now: the time.
        pending: rows that wait, fewer than ``max_batch_size``.
        oldest: when the oldest of them was submitted.
        free_since: since when the model is free and requests are pending.
        max_batch_size: most rows in one forward pass.
        away: callers that have their replies and are expected back, in no order.
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


class BatchingRule(ABC):
    """Decides whether a batch that may leave is held back for more requests. One thread asks it, for one server."""

    @abstractmethod
    def hold(self, situation: Situation) -> Hold | None:
        """Say for what the batch is held back; ``None``: it leaves now.

        Asked each time the model is free and ``min_batch_size <= pending < max_batch_size``, and again when a hold is
        over. The server ends a hold ``batch_timeout`` seconds after the model became free, whatever the rule says.
        """


class LeaveWhenFree(BatchingRule):
    """Never hold a batch back."""

    def hold(self, situation: Situation) -> Hold | None:
        return None


class LearnedRule(BatchingRule):
    """Hold a batch back while the requests that are expected save more than the waiting costs."""

    def hold(self, situation: Situation) -> Hold | None:
        now, n, cost = situation.now, situation.pending, situation.cost
        alone = cost(n)
        best: Hold | None = None
        most = 0.0
        expected = sorted([(remaining(caller, now), caller.rows) for caller in situation.away])
        rows = 0
        for seconds, more in expected:
            rows += more
            if n + rows > situation.max_batch_size:
                break
            gain = n * alone + rows * (alone + cost(rows)) - (n + rows) * (seconds + cost(n + rows))
            if gain > most:
                best, most = Hold(rows, seconds), gain
        return best


def remaining(caller: Caller, now: float) -> float:
    """Seconds until a caller that is away is expected back."""
    return max(caller.answered_at + caller.think_time - now, caller.deviation, 0.0)


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
        self._callers: dict[Caller, None] = {}  # that have come back at least once
        self._target = 0  # pending rows that end the hold under way; 0: there is none

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
        reason = limits.decide(pending=pending, waited=now - oldest, callers=callers, draining=draining)
        if reason is None:
            return Hold(limits.wanted(callers) - pending, oldest + limits.timeout - now)
        target, self._target = self._target, 0
        if reason is not DispatchReason.IDLE:
            return reason
        left = free_since + limits.timeout - now
        if left > 0 and len(self._callers) > 0:
            away = [caller for caller in self._callers if caller.answered_at > caller.asked_at]
            away = [caller for caller in away if self._is_expected(caller, now)]
            hold = None
            if away or not isinstance(self.rule, LearnedRule):
                situation = Situation(now, pending, oldest, free_since, limits.max_batch_size, away, self.cost)
                hold = self.rule.hold(situation)
            if hold is not None and hold.seconds > 0:
                self._target = pending + hold.rows
                return Hold(min(hold.rows, limits.max_batch_size - pending), min(hold.seconds, left))
        elif target:
            return DispatchReason.TIMEOUT
        if target:
            return DispatchReason.GATHERED if pending >= target else DispatchReason.OVERDUE
        return reason

    def _is_expected(self, caller: Caller, now: float) -> bool:
        late = now - caller.answered_at - caller.think_time
        if caller.expected and late > _PATIENCE * caller.deviation:
            caller.expected = False
        return caller.expected

    def on_batch(self, callers: Iterable[Caller | None]) -> None:
        """Learn from requests that were taken into a batch."""
        for caller in callers:
            if caller is None or not caller.answered_at or caller.answered_at > caller.asked_at:
                continue
            seconds = caller.asked_at - caller.answered_at
            caller.expected = True
            if caller.think_time < 0:
                caller.think_time, caller.deviation = seconds, seconds / 2
                self._callers[caller] = None
            else:
                error = seconds - caller.think_time
                caller.think_time += _LEARN * error
                caller.deviation += _LEARN * (abs(error) - caller.deviation)

    def on_pass(self, rows: int, seconds: float) -> None:
        """Learn from a forward pass."""
        self.cost.add(rows, seconds)

    def on_replies(self, callers: Iterable[Caller | None], now: float) -> None:
        """Note that replies are about to leave."""
        for caller in callers:
            if caller is not None:
                caller.answered_at = now
