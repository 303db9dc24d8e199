"""What is measured while a trainer in another process publishes weights, or by it.

The clock and the other work (requests, copies that an update is compared with) are in the process of the
figure: in the trainer's where a call of ``send`` is measured, in the server's where its passes are.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from aioinfer.bench import contenders, drivers, trainers
from aioinfer.bench.models import Policy
from aioinfer.bench.partners import Partner
from aioinfer.bench.results import Figures, percentiles
from aioinfer.bench.workloads import Job, Workload

__all__ = ["measure_gap", "measure_publishing", "measure_send"]

# Whether the trainer publishes. Each state comes early and late as often as the other, against drifts.
_STRETCHES = (False, True, True, False, False, True, True, False)


def measure_send(job: Job, workload: Workload, policy: Policy) -> Figures:
    """``p50`` and ``p99`` of ``send`` until applied, and ``memcpy`` by turns with it if that is compared."""
    assert workload.weights is not None
    with trainers.train(job, workload, policy) as send:
        acts = {"send": send}
        if any(metric.over == "memcpy" for metric in workload.metrics):
            acts["memcpy"] = drivers.memcpy(workload.weights.nbytes)
        times = drivers.by_turns(acts, job.warm_up, job.seconds)
    latencies = percentiles(times.pop("send"))
    return latencies | {name: statistics.median(taken) for name, taken in times.items()}


async def measure_publishing(job: Job, workload: Workload, policy: Policy) -> Figures:
    """``rate`` while a trainer publishes, and ``quiet rate`` while it does not."""
    requests = [policy.request() for _ in range(workload.callers)]
    rates: dict[bool, list[float]] = {False: [], True: []}
    warm_up, seconds = job.warm_up / len(_STRETCHES), job.seconds / len(_STRETCHES)
    updates = 0
    scheme = contenders.make_scheme(job)
    with Partner(trainers.publish_steadily, workload, scheme) as trainer:
        async with contenders.serve_tasks(job, policy.module, workload.callers, weight_sync=scheme) as callers:
            policy.check(await callers[0].call(requests[0]))
            for publishing in _STRETCHES:
                if publishing:
                    trainer.tell("begin")
                rates[publishing].append(await drivers.tasks(callers, requests, warm_up, seconds))
                if publishing:
                    trainer.tell("end")
                    updates += await asyncio.to_thread(trainer.answer)  # its last update needs this event loop
    per_second = updates / len(rates[True]) / (warm_up + seconds)
    if per_second < 0.8 * workload.rate:
        raise RuntimeError(f"{per_second:.1f} updates/s were published instead of {workload.rate:g}")
    return {
        "rate": statistics.fmean(rates[True]),
        "quiet rate": statistics.fmean(rates[False]),
        "updates": updates,
    }


async def measure_gap(job: Job, workload: Workload, policy: Policy) -> Figures:
    """Medians of the longest ``gap`` during an update, the longest as long without one, and ``memcpy``."""
    assert workload.weights is not None
    requests = [policy.request() for _ in range(workload.callers)]
    passes: list[float] = []
    policy.module.register_forward_pre_hook(lambda *_: passes.append(time.perf_counter()))
    copy = drivers.memcpy(workload.weights.nbytes)
    scheme, swap = contenders.make_scheme(job), workload.swap
    rounds: list[tuple[float, float, float]] = []
    with _garbage_frozen(), Partner(trainers.publish_on_demand, workload, scheme) as trainer:
        async with contenders.serve_tasks(
            job, policy.module, workload.callers, weight_sync=scheme, swap=swap
        ) as callers:
            policy.check(await callers[0].call(requests[0]))
            update = partial(asyncio.to_thread, trainer.ask, "update")
            for length in (job.warm_up, job.seconds):
                rounds.clear()
                end = time.perf_counter() + length
                while not rounds or time.perf_counter() < end:
                    copied = drivers.timed(copy)
                    rounds.append((copied, *await drivers.gaps(callers, requests, passes, update)))
    copied, gap, quiet = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {"gap": gap, "quiet gap": quiet, "memcpy": copied, "count": len(rounds)}


@contextmanager
def _garbage_frozen() -> Iterator[None]:
    """Take what is there out of garbage collections: a full one would stop all threads for 100 ms."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
