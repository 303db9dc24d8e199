"""Who makes requests in a simulation, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TypeAlias

from aioinfer.bench.simulation.costs import Cost
from aioinfer.bench.simulation.simulator import Client

__all__ = [
    "Bursts",
    "ClosedLoop",
    "Poisson",
    "Thinks",
    "Turnover",
    "equal",
    "exponential",
    "halves",
    "ladder",
    "lognormal",
    "pareto",
    "pausing",
    "stragglers",
]

Thinks: TypeAlias = Callable[[Random, int, int], Iterator[float]]
"""Think times, in seconds, of caller i of n: ``thinks(random, i, n)``."""


def equal(seconds: float) -> Thinks:
    """Each caller always thinks for as long."""

    def thinks(random: Random, number: int, callers: int) -> Iterator[float]:
        while True:
            yield seconds

    return thinks


def exponential(seconds: float) -> Thinks:
    """Exponential, of this mean."""

    def thinks(random: Random, number: int, callers: int) -> Iterator[float]:
        while True:
            yield random.expovariate(1 / seconds)

    return thinks


def halves(fast: float, slow: float) -> Thinks:
    """Half of the callers are fast, half are slow, each up to 10 % more or less."""

    def thinks(random: Random, number: int, callers: int) -> Iterator[float]:
        seconds = fast if number % 2 else slow
        while True:
            yield seconds * random.uniform(0.9, 1.1)

    return thinks


def ladder(seconds: float, factor: float) -> Thinks:
    """Each caller thinks so many times as long as the one before; up to 10 % more or less."""

    def thinks(random: Random, number: int, callers: int) -> Iterator[float]:
        mean = seconds * factor**number
        while True:
            yield mean * random.uniform(0.9, 1.1)

    return thinks


def lognormal(median: float, sigma: float) -> Thinks:
    """Lognormal: heavy-tailed, of finite variance."""

    def thinks(random: Random, number: int, callers: int) -> Iterator[float]:
        while True:
            yield random.lognormvariate(math.log(median), sigma)

    return thinks


def pareto(least: float, alpha: float) -> Thinks:
    """Pareto: heavy-tailed, of infinite variance where ``alpha`` is below 2; cut off at 1 s."""

    def thinks(random: Random, number: int, callers: int) -> Iterator[float]:
        while True:
            yield min(least * random.paretovariate(alpha), 1.0)

    return thinks


def stragglers(seconds: float, late: float, share: float) -> Thinks:
    """Each think time is the same (10 % more or less), but this share of them is ``late``."""

    def thinks(random: Random, number: int, callers: int) -> Iterator[float]:
        while True:
            yield late if random.random() < share else seconds * random.uniform(0.9, 1.1)

    return thinks


def pausing(seconds: float, pause: float, every: int) -> Thinks:
    """One request of so many is followed by a pause, at random."""
    return stragglers(seconds, pause, 1 / every)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many callers make one request after the other.

    Attributes:
        name: in tables.
        callers: how many.
        thinks: their think times.
        seconds: no request is made later.
        warm_up: requests that are made earlier count for the cold start only.
        spread: the first requests are made within so many seconds.
    """

    name: str
    callers: int
    thinks: Thinks
    seconds: float = 6.0
    warm_up: float = 1.0
    spread: float = 0.02

    @property
    def closed(self) -> bool:
        return True

    def clients(self, seed: int, cost: Cost) -> list[Client]:
        made = []
        for number in range(self.callers):
            random = Random(f"{seed} {number}")
            made.append(Client(random.uniform(0.0, self.spread), self.thinks(random, number, self.callers)))
        return made


class _Varying:
    """The number of callers varies, so that throughput and latency are not tied to each other."""

    __slots__ = ()

    @property
    def callers(self) -> None:
        return None

    @property
    def closed(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Turnover(_Varying):
    """Callers come, make some requests, and never come back; others take their places.

    Attributes:
        name: in tables.
        places: how many there are at once, about.
        thinks: think times.
        requests: how many each makes, on average (geometric).
        gap: seconds from the last reply of one to the first request of the next, on average (exponential). It is
            drawn ahead: a place is taken anew after the time that ``requests`` usually take, with ``service`` seconds
            each, whatever the rule makes of it.
        service: see ``gap``.
        seconds: no request is made later.
        warm_up: requests that are made earlier count for the cold start only.
    """

    name: str
    places: int
    thinks: Thinks
    requests: int
    gap: float
    service: float = 0.01
    seconds: float = 10.0
    warm_up: float = 1.0

    def clients(self, seed: int, cost: Cost) -> list[Client]:
        made = []
        for place in range(self.places):
            random = Random(f"{seed} {place}")
            time = random.uniform(0.0, 0.02)
            while time < self.seconds:
                requests = 1 + int(random.expovariate(1 / self.requests))
                times = list(islice(self.thinks(random, place, self.places), requests))
                made.append(Client(time, iter(times[1:])))
                time += math.fsum(times) + self.service * requests + random.expovariate(1 / self.gap)
        return made


@dataclass(frozen=True, slots=True)
class Poisson(_Varying):
    """Requests of strangers, at random times.

    Attributes:
        name: in tables.
        rate: requests per second; 0: see ``load``.
        load: requests per second, as a share of what passes of up to 64 rows can serve.
        seconds: no request is made later.
        warm_up: requests that are made earlier count for the cold start only.
    """

    name: str
    rate: float = 0.0
    load: float = 0.0
    seconds: float = 10.0
    warm_up: float = 1.0

    def clients(self, seed: int, cost: Cost) -> list[Client]:
        random = Random(f"{seed} arrivals")
        rate = self.rate or self.load * cost.capacity(64)
        made = []
        time = random.expovariate(rate)
        while time <= self.seconds:
            made.append(Client(time, iter(()), None))
            time += random.expovariate(rate)
        return made


@dataclass(frozen=True, slots=True)
class Bursts(_Varying):
    """Strangers come in bursts, at random times.

    Attributes:
        name: in tables.
        rate: bursts per second.
        requests: in a burst, of strangers.
        spread: a burst takes so many seconds; 0: all at once.
        seconds: no request is made later.
        warm_up: requests that are made earlier count for the cold start only.
    """

    name: str
    rate: float
    requests: int
    spread: float = 0.0
    seconds: float = 10.0
    warm_up: float = 1.0

    def clients(self, seed: int, cost: Cost) -> list[Client]:
        random = Random(f"{seed} bursts")
        made = []
        time = random.expovariate(self.rate)
        while time <= self.seconds:
            starts = sorted([time + random.uniform(0.0, self.spread) for _ in range(self.requests)])
            made += [Client(start, iter(()), None) for start in starts]
            time += random.expovariate(self.rate)
        return made
