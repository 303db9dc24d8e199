"""Our collector: its rate, and what it makes of trouble."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aioinfer.bench.collecting import environments
from aioinfer.bench.collecting.environment_log import EnvironmentLog
from aioinfer.bench.collecting.policies import make_policy
from aioinfer.bench.collecting.rates import frame_rate
from aioinfer.bench.report import Figures
from aioinfer.bench.workloads import Collection, Course, Job
from aioinfer.collectors import AsyncBatchedCollector

_STEP_TIMEOUT = 0.5
_LIMIT = 20.0  # seconds until what is awaited must have happened
_PUBLISH_INTERVAL = 0.1
_MEMORY_WARM_UP = 200_000
_MEMORY_FRAMES = 1_000_000


def measure(job: Job, collection: Collection) -> Figures:
    """Make the measurement of the collection's course."""
    return _COURSES[collection.course](job, collection)


@contextmanager
def _collecting(
    job: Job, collection: Collection, make: Callable[[], Any] | Sequence[Callable[[], Any]], **options: Any
) -> Generator[tuple[AsyncBatchedCollector, Iterator[Any]], None, None]:
    """A collector, and the iterator of its batches."""
    collector = AsyncBatchedCollector(
        make,
        policy=make_policy(collection.environment),
        frames_per_batch=collection.frames_per_batch,
        fragment_length=collection.fragment_length,
        num_workers=collection.num_workers,
        order=collection.order,
        local_inference=collection.local_inference,
        seed=job.seed,
        **options,
    )
    with collector:
        yield collector, iter(collector)


def _makers(collection: Collection) -> list[Callable[[], Any]]:
    """What makes each environment, or all of EnvPool's."""
    if collection.environment == "EnvPool":
        return [partial(environments.make_envpool_cartpole, collection.num_envs)]
    if collection.environment == "sleeping":
        return [partial(environments.SleepingEnvironment, number) for number in range(collection.num_envs)]
    return [environments.factory(collection.environment)] * collection.num_envs


def _frames(job: Job, collection: Collection) -> Figures:
    with _collecting(job, collection, _makers(collection)) as (_, batches):
        return {"rate": frame_rate((batch.numel() for batch in batches), job.warm_up, job.seconds)}


# -- environments that await -------------------------------------------------------------------------------------


def _own_paces(job: Job, collection: Collection) -> Figures:
    own = asyncio.run(_step_alone(job, collection))
    return _frames(job, collection) | {"own paces rate": own}


async def _step_alone(job: Job, collection: Collection) -> float:
    """Steps per second of environments each of which steps when it is ready, without a policy."""
    steps = 0

    async def run(environment: Any) -> None:
        nonlocal steps
        await environment.reset(seed=job.seed)
        while True:
            *_, terminated, truncated, _ = await environment.step(0)
            steps += 1
            if terminated or truncated:
                await environment.reset()

    tasks = [asyncio.create_task(run(make())) for make in _makers(collection)]
    await asyncio.sleep(job.warm_up)
    began, before = time.perf_counter(), steps
    await asyncio.sleep(job.seconds)
    rate = (steps - before) / (time.perf_counter() - began)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return rate


# -- trouble -----------------------------------------------------------------------------------------------------


def _kill(job: Job, collection: Collection) -> Figures:
    with EnvironmentLog(collection.num_envs) as log, _collecting(job, collection, log.factories()) as (_, batches):
        _read(batches, job.warm_up)
        victim = log.pid[0]
        its = log.pid == victim
        before = log.makings.copy()
        killed = time.monotonic()
        os.kill(int(victim), signal.SIGKILL)
        _read_until(batches, lambda: bool(np.all((log.makings > before) & (log.first_step > 0), where=its)))
        making = covered_seconds(log.made_from[its], log.made_until[its])
        return {"recovered after": float(log.first_step[its].max()) - killed - making, "making": making}


def covered_seconds(begins: Any, ends: Any) -> float:
    """Seconds that lie within any of the intervals, which may overlap."""
    covered, until = 0.0, 0.0
    for begin, end in sorted(zip(begins.tolist(), ends.tolist(), strict=True)):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def _hang(job: Job, collection: Collection) -> Figures:
    options = {"step_timeout": _STEP_TIMEOUT}
    with (
        EnvironmentLog(collection.num_envs) as log,
        _collecting(job, collection, log.factories(), **options) as (collector, batches),
    ):
        _read(batches, job.warm_up)
        first, last = 0, collection.num_envs - 1
        ends: list[float] = []
        watcher = threading.Thread(target=_watch, args=(int(log.pid[first]), ends), daemon=True)
        if collection.num_workers:
            watcher.start()
        before = log.makings[first]
        log.told_to_hang[first] = 1
        _read_until(batches, lambda: log.makings[first] > before and log.first_step[first] > 0)
        # Its process is killed; a thread can't be, and the environment that takes its place is made.
        noticed = float(log.made_from[first])
        if collection.num_workers:
            watcher.join(_LIMIT)
            noticed = ends[0]
        log.told_to_hang[last] = 1
        _read_until(batches, lambda: log.hung[last] > 0)
        closing = time.monotonic()
        collector.shutdown()
        closed = time.monotonic()
    return {"noticed after": noticed - float(log.hung[first]) - _STEP_TIMEOUT, "shut down after": closed - closing}


def _watch(pid: int, ends: list[float]) -> None:
    """Append the time at which a process ends."""
    descriptor = os.pidfd_open(pid)
    select.select([descriptor], [], [])
    ends.append(time.monotonic())
    os.close(descriptor)


def _read(batches: Iterator[Any], seconds: float) -> None:
    """Read batches for that long."""
    next(batches)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        next(batches)


def _read_until(batches: Iterator[Any], happened: Callable[[], bool]) -> None:
    limit = time.monotonic() + _LIMIT
    while not happened():
        if time.monotonic() > limit:
            raise RuntimeError(f"what was awaited has not happened within {_LIMIT:g} s")
        next(batches)


# -- weights -----------------------------------------------------------------------------------------------------


def _update(job: Job, collection: Collection) -> Figures:
    policy = make_policy(collection.environment)
    versions: list[list[Any]] = [[] for _ in range(collection.num_envs)]
    begun: list[Any] = []  # the steps that each environment had begun when update_weights returned

    def read(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            batch = next(batches)
            numbers = batch["collector", "env"][:, 0].tolist()
            for number, fragment in zip(numbers, batch["policy_version"].clone().numpy(), strict=True):
                versions[number].append(fragment)

    with (
        EnvironmentLog(collection.num_envs) as log,
        _collecting(job, collection, log.factories()) as (collector, batches),
    ):
        read(job.warm_up)
        for _ in range(max(2, round(job.seconds / _PUBLISH_INTERVAL))):
            collector.update_weights(policy)
            begun.append(log.steps.copy())
            read(_PUBLISH_INTERVAL)
        read(_PUBLISH_INTERVAL)
    return {"updated after": float(np.median(steps_until(versions, begun)))}


def steps_until(versions: Sequence[Sequence[Any]], begun: Sequence[Any]) -> list[int]:
    """For each update and environment, the number of its first step with the new weights; 1 is the first one begun.

    Args:
        versions: for each environment, the versions that its steps were computed with, fragment by fragment. An update
            makes the version one higher.
        begun: for each update, the steps that each environment had begun.
    """
    found: list[int] = []
    for number, fragments in enumerate(versions):
        steps = np.concatenate(fragments)
        for update, counts in enumerate(begun, 1):
            first = int(np.searchsorted(steps, steps[0] + update))
            if first < len(steps):
                found.append(first + 1 - int(counts[number]))
    return found


# -- memory ------------------------------------------------------------------------------------------------------


def _memory(job: Job, collection: Collection) -> Figures:
    with _collecting(job, collection, _makers(collection)) as (_, batches):
        sizes: list[float] = []
        for frames in (_MEMORY_WARM_UP, _MEMORY_FRAMES):
            count = 0
            while count < frames:
                count += next(batches).numel()
            gc.collect()
            sizes.append(sum(map(_proportional_size, _processes(os.getpid()))))
        return {"growth": (sizes[1] - sizes[0]) / 1e6, "count": count}


def _processes(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += _processes(int(child))
    return found


def _proportional_size(pid: int) -> float:
    """Bytes of memory; of what is shared, the share of the process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


_COURSES: dict[Course, Callable[[Job, Collection], Figures]] = {
    Course.FRAMES: _frames,
    Course.OWN_PACES: _own_paces,
    Course.KILL: _kill,
    Course.HANG: _hang,
    Course.UPDATE: _update,
    Course.MEMORY: _memory,
}
