"""When a batch leaves, and why.

Pure: no clock, no thread, no queue. The model thread passes the time and the counts, and so do tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BatchRule", "DispatchReason"]


class DispatchReason(StrEnum):
    """Why a batch left."""

    FULL = "full"
    """``max_batch_size`` requests were pending."""
    TIMEOUT = "timeout"
    """The oldest request had waited for ``batch_timeout`` seconds."""
    IDLE = "idle"
    """The model was free and ``min_batch_size`` requests were pending."""
    ALL_WAITING = "all_waiting"
    """Every caller was waiting: no further request could come."""
    DRAIN = "drain"
    """The server was shutting down, and served the pending requests."""


@dataclass(frozen=True, slots=True)
class BatchRule:
    """Decides over pending requests each time the model is free.

    Args:
        max_batch_size: most requests in one forward pass.
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
        """Say whether a batch leaves now.

        Args:
            pending: requests that wait, at least 1.
            waited: seconds since the oldest of them was submitted.
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
        """How many pending requests end the gathering of a partial batch."""
        return self.min_batch_size if callers is None else max(1, min(self.min_batch_size, callers))
