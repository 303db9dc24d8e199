"""What is measured with callers in other processes.

The server is in the measurement's own process. The others are forked off before it begins: to import torch in each
of them would take seconds. They ask as callers in the server's process do (see ``drivers``); of closed loops they
tell how many replies they have had so far whenever they are asked, so that all of them ask for as long as any of
them is counted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from aioinfer.bench import contenders, drivers
from aioinfer.bench.contenders import TaskCaller
from aioinfer.bench.models import Policy
from aioinfer.bench.partners import Partner, Pipe
from aioinfer.bench.results import Figures, percentiles
from aioinfer.bench.workloads import Job, Pattern, System, Workload

__all__ = ["Rota", "measure"]

_Count: TypeAlias = tuple[float, int]
"""When, and how many replies had come until then."""


def measure(job: Job, workload: Workload, policy: Policy) -> Figures:
    """``rate``, or ``p50`` and ``p99`` of one caller."""
    each = workload.callers // workload.processes
    awaiting = workload.pattern is Pattern.TASKS
    context = multiprocessing.get_context("fork")
    transport = contenders.make_process_transport(job, policy, workload.callers, context)
    with ExitStack() as opened:
        workers: list[Partner] = []
        for _ in range(workload.processes):
            clients = contenders.make_process_clients(job, transport, each, awaiting=awaiting)
            workers.append(opened.enter_context(Partner(_ask, job, workload, policy, clients, fork=True)))
        opened.enter_context(contenders.serve_processes(job, policy.module, transport))
        _all(workers, "begin")
        if workload.pattern is Pattern.ONE_THREAD:
            return percentiles(workers[0].answer())
        time.sleep(job.warm_up)
        before = _all(workers, "count")
        time.sleep(job.seconds)
        after = _all(workers, "count")
        _all(workers, "end")
    return {"rate": sum(map(_rate, before, after))}


def _all(workers: Sequence[Partner], question: str) -> list[Any]:
    for worker in workers:
        worker.tell(question)
    return [worker.answer() for worker in workers]


def _rate(before: _Count, after: _Count) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


# -- what the other processes do ---------------------------------------------------------------------------


def _ask(pipe: Pipe, job: Job, workload: Workload, policy: Policy, clients: Sequence[Any]) -> None:
    """Ask with ``clients``, as soon as the server is there."""
    requests = [policy.request() for _ in clients]
    pipe.send("ready")
    pipe.recv()
    if workload.pattern is Pattern.TASKS and job.system == System.OURS:
        asyncio.run(_ask_in_tasks(pipe, policy, clients, requests))
        return
    policy.check(clients[0](requests[0]))
    pipe.send("begun")
    if workload.pattern is Pattern.ONE_THREAD:
        pipe.send(drivers.one_thread(clients[0], requests[0], job.warm_up, job.seconds))
        return
    callers = _callers(job.way, clients)
    with drivers.asking_threads(callers, requests[: len(callers)]) as replies:
        _tell_counts(pipe, replies)
    pipe.send("ended")


async def _ask_in_tasks(pipe: Pipe, policy: Policy, clients: Sequence[Any], requests: Sequence[Any]) -> None:
    policy.check(await clients[0](requests[0]))
    pipe.send("begun")
    async with drivers.asking_tasks([TaskCaller(client, client.submit) for client in clients], requests) as replies:
        await asyncio.to_thread(_tell_counts, pipe, replies)
    pipe.send("ended")


def _tell_counts(pipe: Pipe, replies: Callable[[], int]) -> None:
    while pipe.recv() == "count":
        pipe.send((time.perf_counter(), replies()))


def _callers(way: str, clients: Sequence[Any]) -> Sequence[Callable[[Any], Any]]:
    """What threads call: each its own client, or one thread all of them."""
    if way.endswith("in turn"):
        return [Rota(clients, rounds=False)]
    if way.endswith("in rounds"):
        return [Rota(clients, rounds=True)]
    return clients


class Rota:
    """Many callers in one thread, for replies that can't be awaited: all have asked, and one after the other waits.

    A call returns one reply, for whomever it is the turn of.

    Args:
        clients: with a ``submit``, one for each caller.
        rounds: whether all ask again when all have their replies; or each at once when it has its own.
    """

    def __init__(self, clients: Sequence[Any], *, rounds: bool) -> None:
        self._clients = clients
        self._rounds = rounds
        self._pending: deque[tuple[Any, Any]] = deque()

    def __call__(self, request: Any) -> Any:
        pending = self._pending
        if not pending:
            pending.extend([(client, client.submit(request)) for client in self._clients])
        client, future = pending.popleft()
        reply = future.result()
        if not self._rounds:
            pending.append((client, client.submit(request)))
        return reply
