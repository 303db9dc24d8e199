"""One measurement in a process of its own: ``python -m aioinfer.bench.measure JOB``.

The process prints ``ready`` when everything is imported, waits for a line on standard input, and prints the figures
as JSON. So processes that take turns can import at the same time, and the threads and the garbage that one system
leaves behind never disturb the other.

Where callers are in other processes, the server is in this one. The others are forked off before it begins, since to
import torch in each of them would take seconds. They generate the same loads as callers in the server's process (see
``load_generators``). In a closed loop they report their count of replies whenever they are asked, so that all of them
make requests for as long as any of them is counted.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict

from aioinfer.bench import collecting, requests, serving, systems, weights
from aioinfer.bench import load_generators as load
from aioinfer.bench.models import Policy, step_environments
from aioinfer.bench.peer_process import PeerProcess, Pipe
from aioinfer.bench.report import Figures, percentiles
from aioinfer.bench.systems import TaskCaller
from aioinfer.bench.workloads import Job, Pattern, RequestKind, System, Workload, named


def main(arguments: Sequence[str]) -> None:
    """Run the job in ``arguments``, a JSON object with the fields of :class:`Job`."""
    # The output of libraries must not get between the two lines that the parent reads.
    answers, sys.stdout = sys.stdout, sys.stderr
    job = Job(**json.loads(arguments[0]))
    torch.set_num_threads(1)
    _load_package(job)
    print("ready", file=answers, flush=True)
    if sys.stdin.readline():  # empty: the parent is gone
        print(json.dumps(measure(job)), file=answers, flush=True)


def _load_package(job: Job) -> None:
    workload = named(job.workload)
    if workload.collection is not None:
        collecting.load_package(job)
    elif workload.serving is not None:
        serving.load_package(job, workload.serving)
    else:
        systems.load_package(job)


def measure(job: Job) -> Figures:
    """Make one measurement.

    Returns:
        ``rate`` in requests/s, or ``p50`` and ``p99`` in seconds over ``count`` requests or updates, or all of these;
        or ``gap`` in seconds; or a rate for each kind of requests. Beside them, the figures that they are compared
        with: ``quiet rate``, ``memcpy``, ``pass``, ``pass rate``. Those of collectors are in ``collecting``, and
        those of callers over a network in ``serving``.
    """
    torch.manual_seed(job.seed)
    workload = named(job.workload)
    if workload.collection is not None:
        return collecting.measure(job, workload.collection)
    if workload.serving is not None:
        return serving.measure(job, workload.serving)
    policy = Policy(workload.model, workload.weights)
    if job.system == System.BARE:
        return _measure_bare(job, workload, policy)
    if workload.processes:
        return _measure_processes(job, workload, policy)
    if workload.pattern in (Pattern.THREADS, Pattern.ONE_THREAD):
        return _measure_threads(job, workload, policy)
    if workload.pattern is Pattern.SEND:
        return weights.measure_send(job, workload, policy)
    if workload.pattern is Pattern.PUBLISHING:
        return asyncio.run(weights.measure_publishing(job, workload, policy))
    if workload.pattern is Pattern.GAP:
        return asyncio.run(weights.measure_gap(job, workload, policy))
    return asyncio.run(_measure_tasks(job, workload, policy))


def _measure_bare(job: Job, workload: Workload, policy: Policy) -> Figures:
    """What callers would get if all of them were in each forward pass, and nothing but the model took any time."""
    batch = policy.request(workload.callers)
    with torch.no_grad():
        passes = load.thread_latencies(policy.module, batch, job.warm_up, job.seconds)
    rate = workload.callers / (statistics.fmean(passes) + workload.think_time)
    return {"rate": rate, **(percentiles(passes) if workload.has_latencies else {})}


def _measure_threads(job: Job, workload: Workload, policy: Policy) -> Figures:
    examples = [policy.request(*workload.batch_size) for _ in range(workload.callers)]
    rates = _Rates(job, workload)
    with systems.serve_threads(job, policy.module, workload.callers) as clients:
        for kind in workload.turns:
            callers = [requests.blocking(kind, client) for client in clients]
            prepared = [requests.prepare(kind, example) for example in examples]
            policy.check(callers[0](prepared[0]), *workload.batch_size)
            if workload.pattern is Pattern.ONE_THREAD:
                return _measure_caller(job, workload, policy, callers[0])
            rates.add(kind, load.thread_rate(callers, prepared, rates.warm_up, rates.seconds))
    return rates.figures()


def _measure_caller(job: Job, workload: Workload, policy: Policy, client: Any) -> Figures:
    """Latencies of one blocking caller, and the time of a bare ``pass`` by turns with them if that is compared."""
    request = policy.request(*workload.batch_size)
    if all(metric.over != "pass" for metric in workload.metrics):
        return percentiles(load.thread_latencies(client, request, job.warm_up, job.seconds))
    batch = request.clone()  # the model writes to it
    actions = {"request": lambda: client(request), "pass": lambda: policy.module(batch)}
    with torch.no_grad():
        times = load.time_by_turns(actions, job.warm_up, job.seconds)
    return {**percentiles(times["request"]), "pass": statistics.median(times["pass"])}


async def _measure_tasks(job: Job, workload: Workload, policy: Policy) -> Figures:
    examples = [policy.request() for _ in range(workload.callers)]
    rates = _Rates(job, workload)
    async with systems.serve_tasks(job, policy.module, workload.callers) as clients:
        for kind in workload.turns:
            callers = [TaskCaller(requests.awaiting(kind, client.call), client.submit) for client in clients]
            prepared = [requests.prepare(kind, example) for example in examples]
            policy.check(await callers[0].call(prepared[0]))
            if workload.pattern is Pattern.ONE_TASK:
                return percentiles(await load.task_latencies(callers[0], prepared[0], job.warm_up, job.seconds))
            if workload.pattern is Pattern.OPEN_LOOP:
                schedule = load.arrival_times(workload.rate, job.warm_up + job.seconds, job.seed)
                return percentiles(await load.open_loop_latencies(callers[0], prepared[0], schedule, job.warm_up))
            rates.add(kind, await load.task_rate(callers, prepared, rates.warm_up, rates.seconds))
    return rates.figures()


class _Rates:
    """The rates of a measurement in which kinds of requests take turns.

    Attributes:
        warm_up: seconds of the warm-up of one turn.
        seconds: length of one turn after that.
    """

    def __init__(self, job: Job, workload: Workload) -> None:
        self._workload = workload
        self._rates: dict[RequestKind, list[float]] = {kind: [] for kind in workload.request_kinds}
        self.warm_up = job.warm_up / len(workload.turns)
        self.seconds = job.seconds / len(workload.turns)

    def add(self, kind: RequestKind, rate: float) -> None:
        """Note the rate of one turn."""
        self._rates[kind].append(rate)

    def figures(self) -> Figures:
        """The mean of each kind over its turns, all of which are equally long."""
        return {self._workload.rate_figure(kind): statistics.fmean(rates) for kind, rates in self._rates.items()}


_Count: TypeAlias = tuple[float, int, list[float]]
"""The time, the number of replies until then, and the latencies of those since the last count, if measured."""


def _measure_processes(job: Job, workload: Workload, policy: Policy) -> Figures:
    """``rate``, ``p50`` and ``p99``; one caller has no rate, and where no latency is compared there is none."""
    each = workload.callers // workload.processes
    awaiting = workload.pattern is Pattern.TASKS
    context = multiprocessing.get_context("fork")
    transport = systems.make_process_transport(job, policy, workload.callers, context)
    passes: list[float] = []
    rates = _Rates(job, workload)
    with ExitStack() as stack:
        peers: list[PeerProcess] = []
        for _ in range(workload.processes):
            clients = systems.make_process_clients(job, transport, each, awaiting=awaiting)
            peers.append(stack.enter_context(PeerProcess(run_callers, job, workload, policy, clients, fork=True)))
        if workload.pattern is Pattern.GROUPS:
            _time_passes(policy, passes)
        stack.enter_context(systems.make_server(job, policy.module, transport))
        for kind in workload.turns:
            _ask_all(peers, "begin")
            if workload.pattern is Pattern.ONE_THREAD:
                found: Figures = peers[0].answer()
                return found
            time.sleep(rates.warm_up)
            passes.clear()
            before = _ask_all(peers, "count")
            time.sleep(rates.seconds)
            after = _ask_all(peers, "count")
            while not sum(map(reply_rate, before, after)):  # on a machine with much else to do
                time.sleep(rates.seconds)
                after = _ask_all(peers, "count")
            _ask_all(peers, "end")
            rates.add(kind, sum(map(reply_rate, before, after)))
    figures = rates.figures()
    latencies = [latency for *_, measured in after for latency in measured]
    if latencies:
        figures |= percentiles(latencies)
    if passes:
        figures["pass rate"] = 1 / statistics.fmean(passes)
    return figures


def _time_passes(policy: Policy, times: list[float]) -> None:
    """Append the duration of each forward pass from now on."""
    started = 0.0

    def begin(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    policy.module.register_forward_pre_hook(begin)
    policy.module.register_forward_hook(lambda *_: times.append(time.perf_counter() - started))


def _ask_all(peers: Sequence[PeerProcess], question: str) -> list[Any]:
    for peer in peers:
        peer.send(question)
    return [peer.answer() for peer in peers]


def reply_rate(before: _Count, after: _Count) -> float:
    """Replies per second between two counts."""
    return (after[1] - before[1]) / (after[0] - before[0])


def run_callers(pipe: Pipe, job: Job, workload: Workload, policy: Policy, clients: Sequence[Any]) -> None:
    """Make requests with ``clients`` in each turn: the other process of a measurement, which begins and ends them."""
    examples = [policy.request(*workload.batch_size) for _ in clients]
    pipe.send("ready")
    if workload.pattern is Pattern.TASKS and job.system == System.OURS:
        asyncio.run(_run_tasks(pipe, workload, policy, clients, examples))
        return
    for kind in workload.turns:
        pipe.recv()
        asking = [requests.blocking(kind, client) for client in clients]
        prepared = [requests.prepare(kind, example) for example in examples]
        policy.check(asking[0](prepared[0]), *workload.batch_size)
        pipe.send("begun")
        if workload.pattern is Pattern.ONE_THREAD:
            pipe.send(_measure_caller(job, workload, policy, asking[0]))
            return
        callers = _multiplex(job.way, workload.pattern, clients) or asking
        timed: list[load.TimedCall] = []
        if workload.think_time or workload.has_latencies:
            callers = timed = [load.TimedCall(call, workload.think_time) for call in callers]
        with load.closed_loop_threads(callers, prepared[: len(callers)]) as replies:
            _report_counts(pipe, replies, timed if workload.has_latencies else ())
        pipe.send("ended")


async def _run_tasks(
    pipe: Pipe, workload: Workload, policy: Policy, clients: Sequence[Any], examples: Sequence[TensorDict]
) -> None:
    for kind in workload.turns:
        await asyncio.to_thread(pipe.recv)
        callers = [TaskCaller(requests.awaiting(kind, client), client.submit) for client in clients]
        prepared = [requests.prepare(kind, example) for example in examples]
        policy.check(await callers[0].call(prepared[0]))
        pipe.send("begun")
        async with load.closed_loop_tasks(callers, prepared) as replies:
            await asyncio.to_thread(_report_counts, pipe, replies)
        pipe.send("ended")


def _report_counts(pipe: Pipe, replies: Callable[[], int], timed: Sequence[load.TimedCall] = ()) -> None:
    while pipe.recv() == "count":
        count: _Count = time.perf_counter(), replies(), [latency for call in timed for latency in call.take()]
        pipe.send(count)


def _multiplex(way: str, pattern: Pattern, clients: Sequence[Any]) -> Sequence[Callable[[Any], Any]]:
    """The callable of the one thread that makes all requests; none if each client has a thread."""
    if pattern is Pattern.GROUPS:
        return [MultiplexedCaller(clients, rounds=False, step=step_environments)]
    if way.endswith("in turn"):
        return [MultiplexedCaller(clients, rounds=False)]
    if way.endswith("in rounds"):
        return [MultiplexedCaller(clients, rounds=True)]
    return []


class MultiplexedCaller:
    """Several callers in one thread: all submit, and the thread waits for one by one.

    A call returns the reply of the caller that has waited longest.

    Args:
        clients: with a ``submit``, one for each caller.
        rounds: whether all callers submit again when all have their replies; otherwise each does at its own reply.
        step: makes the next request of a caller out of its last one and the reply; ``None``: it stays the same.
    """

    def __init__(self, clients: Sequence[Any], *, rounds: bool, step: Callable[[Any, Any], None] | None = None) -> None:
        self._clients = clients
        self._rounds = rounds
        self._step = step
        self._pending: deque[tuple[Any, Any]] = deque()

    def __call__(self, request: Any) -> Any:
        pending = self._pending
        if not pending:
            pending.extend([(client, client.submit(request)) for client in self._clients])
        client, future = pending.popleft()
        reply = future.result()
        if self._step is not None:
            self._step(request, reply)
        if not self._rounds:
            pending.append((client, client.submit(request)))
        return reply


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # to take torch apart takes half a second, and 150 of these processes run
