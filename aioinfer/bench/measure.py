"""One measurement in a process of its own: ``python -m aioinfer.bench.measure JOB``.

It prints ``ready`` when everything is imported, waits for a line on standard input, and prints the figures as
JSON. So processes that take turns can import at the same time, and what a system leaves behind (threads,
garbage) never meets the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence

import torch

from aioinfer.bench import contenders, drivers, processes, weights
from aioinfer.bench.models import Policy
from aioinfer.bench.results import Figures, percentiles
from aioinfer.bench.workloads import Job, Pattern, System, Workload, named

__all__ = ["main", "measure"]


def main(arguments: Sequence[str]) -> None:
    """Run the job in ``arguments``, a JSON object with the fields of :class:`Job`."""
    # What libraries may print must not get between the two lines that the parent reads.
    answers, sys.stdout = sys.stdout, sys.stderr
    job = Job(**json.loads(arguments[0]))
    torch.set_num_threads(1)
    contenders.prepare(job)
    print("ready", file=answers, flush=True)
    if sys.stdin.readline():  # empty: the parent is gone
        print(json.dumps(measure(job)), file=answers, flush=True)


def measure(job: Job) -> Figures:
    """Make one measurement.

    Returns:
        ``rate`` in requests/s; or ``p50`` and ``p99`` in seconds over ``count`` requests or updates; or ``gap`` in
        seconds. Beside them, what they are compared with: ``quiet rate``, ``memcpy``.
    """
    torch.manual_seed(job.seed)
    workload = named(job.workload)
    policy = Policy(workload.model, workload.weights)
    if job.system == System.BARE:
        return {"rate": drivers.bare(policy.module, policy.request(workload.callers), job.warm_up, job.seconds)}
    if workload.processes:
        return processes.measure(job, workload, policy)
    if workload.pattern in (Pattern.THREADS, Pattern.ONE_THREAD):
        return _measure_threads(job, workload, policy)
    if workload.pattern is Pattern.SEND:
        return weights.measure_send(job, workload, policy)
    if workload.pattern is Pattern.PUBLISHING:
        return asyncio.run(weights.measure_publishing(job, workload, policy))
    if workload.pattern is Pattern.GAP:
        return asyncio.run(weights.measure_gap(job, workload, policy))
    return asyncio.run(_measure_tasks(job, workload, policy))


def _measure_threads(job: Job, workload: Workload, policy: Policy) -> Figures:
    requests = [policy.request() for _ in range(workload.callers)]
    with contenders.serve_threads(job, policy.module, workload.callers) as callers:
        policy.check(callers[0](requests[0]))
        if workload.pattern is Pattern.ONE_THREAD:
            return percentiles(drivers.one_thread(callers[0], requests[0], job.warm_up, job.seconds))
        return {"rate": drivers.threads(callers, requests, job.warm_up, job.seconds)}


async def _measure_tasks(job: Job, workload: Workload, policy: Policy) -> Figures:
    requests = [policy.request() for _ in range(workload.callers)]
    async with contenders.serve_tasks(job, policy.module, workload.callers) as callers:
        policy.check(await callers[0].call(requests[0]))
        if workload.pattern is Pattern.ONE_TASK:
            return percentiles(await drivers.one_task(callers[0], requests[0], job.warm_up, job.seconds))
        if workload.pattern is Pattern.OPEN_LOOP:
            schedule = drivers.arrivals(workload.rate, job.warm_up + job.seconds, job.seed)
            return percentiles(await drivers.open_loop(callers[0], requests[0], schedule, job.warm_up))
        return {"rate": await drivers.tasks(callers, requests, job.warm_up, job.seconds)}


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # to take torch apart takes half a second, and 150 of these processes run
