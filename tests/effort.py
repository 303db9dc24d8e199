"""How often a test tries what goes wrong at random moments: a little every time, and much under stress."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

__all__ = ["Effort", "efforts"]


@dataclass(frozen=True)
class Effort:
    """What a test that asks for the fixture ``effort`` is given.

    Attributes:
        seed: for what is random; another one in each round of stress.
        stress: whether this is such a round.
    """

    seed: int = 0
    stress: bool = False

    def times(self, usual: int, stress: int) -> int:
        """The one number, or under stress the other."""
        return stress if self.stress else usual

    def random(self) -> random.Random:
        """Make random numbers that are the same in each run."""
        return random.Random(self.seed)


def efforts(rounds: int) -> list[object]:
    """The efforts with which each test is run that asks for one; pytest deselects stress where nobody asks for it."""
    stress = (Effort(seed, stress=True) for seed in range(1, rounds + 1))
    return [
        pytest.param(Effort(), id="a little"),
        *(pytest.param(effort, id=f"stress-{effort.seed}", marks=pytest.mark.stress) for effort in stress),
    ]
