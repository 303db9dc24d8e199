"""What a forward pass takes in a simulation, by its number of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

__all__ = ["COSTS", "Cost"]


def _exactly(random: Random) -> float:
    return 1.0


def _lognormal(random: Random) -> float:
    return math.exp(0.3 * random.gauss(0.0, 1.0) - 0.045)  # of mean 1


def _spikes(random: Random) -> float:
    return 5.0 if random.random() < 0.02 else 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a pass.

    Attributes:
        name: in tables.
        mean: by rows, without noise.
        noise: a factor of each pass.
    """

    name: str
    mean: Callable[[int], float]
    noise: Callable[[Random], float] = _exactly

    def __call__(self, rows: int, random: Random) -> float:
        """Draw what one pass takes."""
        return self.mean(rows) * self.noise(random)

    def capacity(self, max_batch_size: int) -> float:
        """Return the most requests per second that passes of at most so many rows serve."""
        return max(rows / self.mean(rows) for rows in range(1, max_batch_size + 1))


COSTS = {
    cost.name: cost
    for cost in (
        Cost("10 ms", lambda rows: 0.01),
        Cost("n ms", lambda rows: 0.001 * rows),
        Cost("5 + 0.2 n ms", lambda rows: 0.005 + 0.0002 * rows),
        Cost("1 + n ms", lambda rows: 0.001 + 0.001 * rows),
        Cost("0.2 + 0.005 n ms", lambda rows: 0.0002 + 0.000005 * rows),
        Cost("10 ms ± 30 %", lambda rows: 0.01, _lognormal),
        Cost("10 ms, 2 % take 50", lambda rows: 0.01, _spikes),
        Cost("4 ms per 16", lambda rows: 0.004 * math.ceil(rows / 16)),
    )
}
