"""How often environments that failed are made anew."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["RestartBudget", "Restarts"]

_WINDOW = 60.0
"""The seconds that ``per_minute`` counts over."""


@dataclass(frozen=True)
class Restarts:
    """How often an environment that failed may be restarted; one that fails once more is retired.

    What one factory makes is counted as one: the environments of a vector environment are restarted together.

    Args:
        lifetime: restarts of each environment, at most, as long as the collector lives.
        per_minute: restarts of each environment, at most, within any 60 seconds.

    Raises:
        TypeError: one is no integer.
        ValueError: ``lifetime`` is below 0, or ``per_minute`` below 1.
    """

    lifetime: int = 10
    per_minute: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (("lifetime", self.lifetime, 0), ("per_minute", self.per_minute, 1)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


class RestartBudget:
    """The restarts that the members of a collector have left. One thread owns it.

    Args:
        restarts: that each member has; ``None`` for none at all.

    Attributes:
        spent: how many restarts each member has had; one that had none is not there.
    """

    def __init__(self, restarts: Restarts | None) -> None:
        self.spent: dict[int, int] = {}
        self._restarts = restarts
        self._recent: dict[int, deque[float]] = {}  # when each member was restarted, the last minute at least

    def spend(self, member: int, now: float) -> bool:
        """Spend a restart of ``member``, if it has one left.

        Args:
            member: that failed.
            now: the time in seconds, of any clock that never goes back.

        Returns:
            Whether it is to be restarted; if not, nothing is spent.
        """
        restarts = self._restarts
        if restarts is None or self.spent.get(member, 0) >= restarts.lifetime:
            return False
        recent = self._recent.setdefault(member, deque())
        while recent and now - recent[0] >= _WINDOW:
            recent.popleft()
        if len(recent) >= restarts.per_minute:
            return False
        recent.append(now)
        self.spent[member] = self.spent.get(member, 0) + 1
        return True
