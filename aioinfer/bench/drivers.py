"""The loads: they ask as a workload says, and measure. All times in seconds."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from aioinfer.bench.contenders import TaskCaller

__all__ = ["arrivals", "bare", "one_task", "one_thread", "open_loop", "tasks", "threads"]

# The closed loops that measure a rate read no clock per request: it would cost the faster system the larger share.


async def tasks(callers: Sequence[TaskCaller], requests: Sequence[Any], warm_up: float, seconds: float) -> float:
    """Replies per second to tasks that ask again as soon as they have their reply."""
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
            await asyncio.sleep(warm_up)
            started, before = time.perf_counter(), replies
            await asyncio.sleep(seconds)
            rate = (replies - before) / (time.perf_counter() - started)
            running = False
    except ExceptionGroup as failed:  # most likely all of the same
        raise failed.exceptions[0] from None
    return rate


def threads(callers: Sequence[Callable[[Any], Any]], requests: Sequence[Any], warm_up: float, seconds: float) -> float:
    """Replies per second to blocking threads that ask again as soon as they have their reply."""
    replies = [0] * len(callers)
    running = True

    def ask(index: int) -> None:
        call, request = callers[index], requests[index]
        while running:
            call(request)
            replies[index] += 1

    with ThreadPoolExecutor(len(callers)) as pool:
        asking = [pool.submit(ask, index) for index in range(len(callers))]
        time.sleep(warm_up)
        started, before = time.perf_counter(), sum(replies)
        time.sleep(seconds)
        rate = (sum(replies) - before) / (time.perf_counter() - started)
        running = False
    for thread in asking:
        thread.result()
    return rate


def one_thread(call: Callable[[Any], Any], request: Any, warm_up: float, seconds: float) -> list[float]:
    """Latencies of one blocking caller."""
    _until(time.perf_counter() + warm_up, lambda: call(request))
    latencies: list[float] = []
    clock, end = time.perf_counter, time.perf_counter() + seconds
    started = clock()
    while started < end:
        call(request)
        done = clock()
        latencies.append(done - started)
        started = done
    return latencies


async def one_task(caller: TaskCaller, request: Any, warm_up: float, seconds: float) -> list[float]:
    """Latencies of one awaiting caller."""
    call, clock = caller.call, time.perf_counter
    latencies: list[float] = []
    for length in (warm_up, seconds):
        latencies.clear()
        started = clock()
        end = started + length
        while started < end:
            await call(request)
            done = clock()
            latencies.append(done - started)
            started = done
    return latencies


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Random times from 0 to ``seconds`` with exponential gaps, ``rate`` per second on average."""
    gaps = random.Random(seed)
    times: list[float] = []
    at = gaps.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += gaps.expovariate(rate)
    return times


async def open_loop(caller: TaskCaller, request: Any, schedule: Sequence[float], warm_up: float) -> list[float]:
    """Latencies, from the actual ``submit`` until the reply's callback, of requests that a schedule makes.

    Between arrivals the generator sleeps, as a program that waits for events would; requests that came due
    meanwhile are submitted together.
    """
    submit, clock = caller.submit, time.perf_counter
    latencies: list[float] = []
    futures: list[asyncio.Future[Any]] = []

    def send(measured: bool) -> None:
        submitted = clock()
        future = submit(request)
        if measured:
            future.add_done_callback(lambda _: latencies.append(clock() - submitted))
        futures.append(future)

    started = clock()
    for at in schedule:
        # Without a sleep the event loop gets no turn, so that all requests which are due leave together.
        if (left := started + at - clock()) > 0:
            await asyncio.sleep(left)
        send(measured=at >= warm_up)
    await asyncio.gather(*futures)
    return latencies


def bare(forward: Callable[[Any], Any], batch: Any, warm_up: float, seconds: float) -> float:
    """Rows per second of forward passes on a ready batch ``[B]``."""
    with torch.no_grad():
        _until(time.perf_counter() + warm_up, lambda: forward(batch))
        started = time.perf_counter()
        passes = _until(started + seconds, lambda: forward(batch))
        return float(passes * batch.batch_size[0] / (time.perf_counter() - started))


def _until(end: float, act: Callable[[], object]) -> int:
    """Act until ``end``, at least once; return how often."""
    times = 1
    act()
    while time.perf_counter() < end:
        act()
        times += 1
    return times
