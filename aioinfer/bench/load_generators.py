"""Load generators: closed and open loops of requests, and the rates, latencies and gaps that they measure.

All times are in seconds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from aioinfer.bench.report import FEWEST_TIMES
from aioinfer.bench.systems import TaskCaller

Call: TypeAlias = Callable[[Any], Any]
"""A blocking client, or a function that stands for one."""

# The closed loops that measure a rate read no clock per request: it would cost the faster system the larger share.


async def task_rate(callers: Sequence[TaskCaller], requests: Sequence[Any], warm_up: float, seconds: float) -> float:
    """Replies per second to tasks, each of which makes its next request at its reply."""
    async with closed_loop_tasks(callers, requests) as replies:
        await asyncio.sleep(warm_up)
        started, before = time.perf_counter(), replies()
        await asyncio.sleep(seconds)
        while replies() == before:  # noqa: ASYNC110 - on a machine with much else to do
            await asyncio.sleep(seconds)
        return (replies() - before) / (time.perf_counter() - started)


@asynccontextmanager
async def closed_loop_tasks(callers: Sequence[TaskCaller], requests: Sequence[Any]) -> AsyncIterator[Callable[[], int]]:
    """Let tasks make requests until the end of the block; yield a function that returns the number of replies."""
    replies = 0
    running = True

    async def ask(caller: TaskCaller, request: Any) -> None:
        nonlocal replies
        call = caller.call
        while running:
            await call(request)
            replies += 1

    try:
        async with asyncio.TaskGroup() as group:
            for caller, request in zip(callers, requests, strict=True):
                group.create_task(ask(caller, request))
            yield lambda: replies
            running = False
    except ExceptionGroup as failed:  # most likely all of the same
        raise failed.exceptions[0] from None


def thread_rate(callers: Sequence[Call], requests: Sequence[Any], warm_up: float, seconds: float) -> float:
    """Replies per second to blocking threads, each of which makes its next request at its reply."""
    with closed_loop_threads(callers, requests) as replies:
        time.sleep(warm_up)
        started, before = time.perf_counter(), replies()
        time.sleep(seconds)
        while replies() == before:  # on a machine with much else to do
            time.sleep(seconds)
        return (replies() - before) / (time.perf_counter() - started)


@contextmanager
def closed_loop_threads(callers: Sequence[Call], requests: Sequence[Any]) -> Iterator[Callable[[], int]]:
    """Let threads make requests until the end of the block; yield a function that returns the number of replies.

    It raises what a thread has ended of.
    """
    replies = [0] * len(callers)
    running = True

    def ask(index: int) -> None:
        call, request = callers[index], requests[index]
        while running:
            call(request)
            replies[index] += 1

    def count() -> int:
        for thread in asking:
            if thread.done():
                thread.result()
        return sum(replies)

    with ThreadPoolExecutor(len(callers)) as pool:
        asking = [pool.submit(ask, index) for index in range(len(callers))]
        try:
            yield count
        finally:
            running = False
    for thread in asking:
        thread.result()


class TimedCall:
    """A blocking client that notes the latency of each reply, and then thinks.

    The thread of its caller uses it; any other one may take the latencies.

    Args:
        call: the client.
        think_time: seconds until it returns the reply, which are no part of the latency.
    """

    def __init__(self, call: Call, think_time: float = 0.0) -> None:
        self._call = call
        self._think_time = think_time
        self._latencies: list[float] = []

    def __call__(self, request: Any) -> Any:
        started = time.perf_counter()
        reply = self._call(request)
        self._latencies.append(time.perf_counter() - started)
        if self._think_time:
            time.sleep(self._think_time)
        return reply

    def take(self) -> list[float]:
        """The latencies since this was last called."""
        taken = self._latencies[:]
        del self._latencies[: len(taken)]
        return taken


def thread_latencies(call: Call, request: Any, warm_up: float, seconds: float) -> list[float]:
    """Latencies of one blocking caller."""
    _until(time.perf_counter() + warm_up, lambda: call(request))
    latencies: list[float] = []
    clock, end = time.perf_counter, time.perf_counter() + seconds
    started = clock()
    while started < end or len(latencies) < FEWEST_TIMES:
        call(request)
        done = clock()
        latencies.append(done - started)
        started = done
    return latencies


async def task_latencies(caller: TaskCaller, request: Any, warm_up: float, seconds: float) -> list[float]:
    """Latencies of one awaiting caller."""
    call, clock = caller.call, time.perf_counter
    latencies: list[float] = []
    for length in (warm_up, seconds):
        latencies.clear()
        started = clock()
        end = started + length
        while started < end or len(latencies) < FEWEST_TIMES:
            await call(request)
            done = clock()
            latencies.append(done - started)
            started = done
    return latencies


def arrival_times(rate: float, seconds: float, seed: int) -> list[float]:
    """Random times from 0 to ``seconds`` with exponential gaps, ``rate`` per second on average."""
    gaps = random.Random(seed)
    times: list[float] = []
    at = gaps.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += gaps.expovariate(rate)
    return times


async def open_loop_latencies(caller: TaskCaller, request: Any, times: Sequence[float], warm_up: float) -> list[float]:
    """Latencies, from the actual ``submit`` until the reply's callback, of requests at the times of a schedule.

    Between arrivals the generator sleeps, like a program that waits for events; requests that fall due meanwhile
    are submitted together.
    """
    submit, clock = caller.submit, time.perf_counter
    latencies: list[float] = []
    pending: set[asyncio.Future[Any]] = set()

    def send(measured: bool) -> None:
        submitted = clock()

        def answered(future: asyncio.Future[Any]) -> None:
            if measured:
                latencies.append(clock() - submitted)
            if future.exception() is None:  # else gather raises it at the end
                pending.discard(future)  # kept replies would slow garbage collections down

        future = submit(request)
        future.add_done_callback(answered)
        pending.add(future)

    started = clock()
    for at in times:
        # Without a sleep the event loop gets no turn, so that all due requests leave together.
        if (left := started + at - clock()) > 0:
            await asyncio.sleep(left)
        send(measured=at >= warm_up)
    await asyncio.gather(*pending)
    return latencies


_SETTLE = 0.05  # seconds for tasks to get into step, and for the work that may follow an update


def copy_of(nbytes: int) -> Callable[[], object]:
    """A function that copies so many bytes from one tensor to another, whose pages are all written."""
    source, target = torch.ones(nbytes // 4), torch.zeros(nbytes // 4)
    target.copy_(source)
    return lambda: target.copy_(source)


def time_by_turns(
    actions: Mapping[str, Callable[[], object]], warm_up: float, seconds: float
) -> dict[str, list[float]]:
    """Durations of several actions, one after the other, again and again."""
    times: dict[str, list[float]] = {name: [] for name in actions}

    def take_turns() -> None:
        for name, action in actions.items():
            times[name].append(seconds_of(action))

    _until(time.perf_counter() + warm_up, take_turns)
    for taken in times.values():
        taken.clear()
    _until(time.perf_counter() + seconds, take_turns, FEWEST_TIMES)
    return times


def seconds_of(action: Callable[[], object]) -> float:
    """The duration of one call of ``action``."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


async def update_gaps(
    callers: Sequence[TaskCaller],
    requests: Sequence[Any],
    passes: list[float],
    update: Callable[[], Awaitable[tuple[float, float]]],
) -> tuple[float, float]:
    """The longest gap between two forward passes during a weight update, and during as long without one.

    Args:
        callers: clients of the tasks that keep the server busy.
        requests: one for each task.
        passes: the times at which passes begin, which the model appends.
        update: makes an update, and returns the times at which it began and at which the new weights were in use.
    """
    passes[:] = [time.perf_counter()]
    async with closed_loop_tasks(callers, requests):
        await asyncio.sleep(_SETTLE)
        begun, ended = await update()
        await asyncio.sleep(_SETTLE)
        quiet = time.perf_counter()
        await asyncio.sleep(ended - begun)
    passes.append(time.perf_counter())  # so that each of the times above is between two
    return longest_gap(passes, begun, ended), longest_gap(passes, quiet, quiet + ended - begun)


def longest_gap(passes: Sequence[float], begun: float, ended: float) -> float:
    """The longest time from one pass to the next, if it lies at least partly between ``begun`` and ``ended``."""
    return max(later - earlier for earlier, later in pairwise(passes) if later >= begun and earlier <= ended)


def _until(end: float, action: Callable[[], object], fewest: int = 1) -> int:
    """Repeat ``action`` until ``end``, at least ``fewest`` times; return the number of calls."""
    times = 0
    while times < fewest or time.perf_counter() < end:
        action()
        times += 1
    return times
