"""Measurements of weight updates: a trainer and a server in two processes, of either system.

The clock and the other work (requests, copies that an update is compared with) are in the process of the
figure: in the trainer's where a call of ``send`` is measured, in the server's where its passes are.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict

from aioinfer.bench import load_generators as load
from aioinfer.bench.models import Policy
from aioinfer.bench.peer_process import PeerProcess, Pipe
from aioinfer.bench.report import Figures, percentiles
from aioinfer.bench.systems import make_scheme, serve_tasks, serve_threads
from aioinfer.bench.workloads import Job, System, Workload

# Whether the trainer publishes. Each state comes early and late as often as the other, against drifts.
_STRETCHES = (False, True, True, False, False, True, True, False)


def measure_send(job: Job, workload: Workload, policy: Policy) -> Figures:
    """``p50`` and ``p99`` of ``send`` until applied, and ``memcpy`` by turns with it if that is compared."""
    assert workload.weights is not None
    with _train(job, workload, policy) as send:
        actions = {"send": send}
        if any(metric.over == "memcpy" for metric in workload.metrics):
            actions["memcpy"] = load.copy_of(workload.weights.nbytes)
        times = load.time_by_turns(actions, job.warm_up, job.seconds)
    latencies = percentiles(times.pop("send"))
    return latencies | {name: statistics.median(taken) for name, taken in times.items()}


async def measure_publishing(job: Job, workload: Workload, policy: Policy) -> Figures:
    """``rate`` while a trainer publishes, and ``quiet rate`` while it does not."""
    requests = [policy.request() for _ in range(workload.callers)]
    rates: dict[bool, list[float]] = {False: [], True: []}
    warm_up, seconds = job.warm_up / len(_STRETCHES), job.seconds / len(_STRETCHES)
    updates = 0
    scheme = make_scheme(job)
    with PeerProcess(_publish_steadily, workload, scheme) as trainer:
        async with serve_tasks(job, policy.module, workload.callers, weight_sync=scheme) as callers:
            policy.check(await callers[0].call(requests[0]))
            for publishing in _STRETCHES:
                if publishing:
                    trainer.send("begin")
                rates[publishing].append(await load.task_rate(callers, requests, warm_up, seconds))
                if publishing:
                    trainer.send("end")
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
    copy = load.copy_of(workload.weights.nbytes)
    scheme, swap = make_scheme(job), workload.swap
    rounds: list[tuple[float, float, float]] = []
    with _garbage_frozen(), PeerProcess(_publish_on_demand, workload, scheme) as trainer:
        async with serve_tasks(job, policy.module, workload.callers, weight_sync=scheme, swap=swap) as callers:
            policy.check(await callers[0].call(requests[0]))
            update = partial(asyncio.to_thread, trainer.ask, "update")
            for length in (job.warm_up, job.seconds):
                rounds.clear()
                end = time.perf_counter() + length
                while not rounds or time.perf_counter() < end:
                    copied = load.seconds_of(copy)
                    rounds.append((copied, *await load.update_gaps(callers, requests, passes, update)))
    copied, gap, quiet = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {"gap": gap, "quiet gap": quiet, "memcpy": copied, "count": len(rounds)}


@contextmanager
def _garbage_frozen() -> Iterator[None]:
    """Freeze the garbage collector: a full collection would stop all threads for 100 ms."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_BUSY = 0.05  # seconds


@contextmanager
def _train(job: Job, workload: Workload, policy: Policy) -> Iterator[Callable[[], object]]:
    """Connect the weights of ``policy`` to a server in another process, and yield a function that sends them.

    It returns when the weights are applied. Both systems receive with their ``InferenceServer``, as a user would:
    torchrl's works with its queue scheme across processes too, whose background thread applies the weights and
    acknowledges. Neither server has requests meanwhile. torchrl's ``send()`` finds a model only in a collector, so
    it is given the model.

    Raises:
        RuntimeError: the server's answer differs from that of the trainer's own model.
    """
    scheme = make_scheme(job)
    if job.system == System.TORCHRL:
        spawn = torch.multiprocessing.get_context("spawn")
        scheme.init_on_sender(model_id="policy", model=policy.module, devices=[torch.device("cpu")], ctx=spawn)
        send = partial(scheme.send, policy.module)
    else:
        scheme.init_on_sender(model=policy.module)
        send = scheme.send
    with PeerProcess(_serve, job, workload, scheme) as server:
        scheme.connect()
        check_served_weights(policy, send, server)
        yield send


def check_served_weights(policy: Policy, send: Callable[[], object], server: PeerProcess) -> None:
    """Send changed weights, and make sure that the server answers with them; else raise ``RuntimeError``."""
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(1)
        request = policy.request()
        expected = policy.module(request.clone())["action"]
    send()
    action = torch.tensor(server.ask(request["observation"].tolist()))
    if not torch.allclose(action, expected, rtol=1e-4):
        raise RuntimeError(f"the server answered {action.tolist()} after send(), the model {expected.tolist()}")


def _serve(pipe: Pipe, job: Job, workload: Workload, scheme: Any) -> None:
    """Serve the workload's model; answer observations with actions."""
    policy = Policy(workload.model, workload.weights)
    with serve_threads(job, policy.module, 1, weight_sync=scheme, swap=workload.swap) as (client,):
        pipe.send("ready")
        while True:
            observation = torch.tensor(pipe.recv())
            pipe.send(client(TensorDict({"observation": observation}))["action"].tolist())


def _publish_on_demand(pipe: Pipe, workload: Workload, scheme: Any) -> None:
    """Publish the weights of the workload's model at each question; answer the times of beginning and end."""
    _connect(workload, scheme)
    pipe.send("ready")
    while True:
        pipe.recv()
        # As a trainer does that computes until it publishes. One that has just been woken stands in the way of
        # the thread that woke it until the scheduler moves one of them to another core.
        busy_until = time.perf_counter() + _BUSY
        while (begun := time.perf_counter()) < busy_until:
            pass
        scheme.send()
        pipe.send((begun, time.perf_counter()))  # the same clock in all processes


def _publish_steadily(pipe: Pipe, workload: Workload, scheme: Any) -> None:
    """After a message, publish at the workload's rate until the next message; answer the number of updates."""
    _connect(workload, scheme)
    pipe.send("ready")
    while True:
        pipe.recv()
        sent, due = 0, time.perf_counter()
        while not pipe.poll(max(0.0, due - time.perf_counter())):
            scheme.send()
            sent += 1
            due = max(due + 1 / workload.rate, time.perf_counter())  # a late update is followed by no burst
        pipe.recv()
        pipe.send(sent)


def _connect(workload: Workload, scheme: Any) -> None:
    scheme.init_on_sender(model=Policy(workload.model, workload.weights).module)
    scheme.connect()
