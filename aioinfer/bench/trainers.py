"""A trainer and a server in two processes, of either system: one of them here, the other in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict

from aioinfer.bench.contenders import make_scheme, serve_threads
from aioinfer.bench.models import Policy
from aioinfer.bench.partners import Partner, Pipe
from aioinfer.bench.workloads import Job, System, Workload

__all__ = ["publish_on_demand", "publish_steadily", "train"]

_BUSY = 0.05  # seconds


@contextmanager
def train(job: Job, workload: Workload, policy: Policy) -> Iterator[Callable[[], object]]:
    """Connect the weights of ``policy`` to a server in another process, and yield what sends them.

    The call returns when they are applied. Both systems receive with their ``InferenceServer``, as a user would:
    torchrl's works with its queue scheme across processes too, whose background thread applies the weights and
    acknowledges. Neither server has requests meanwhile. torchrl's ``send()`` finds a model only in a collector, so
    it is given the model.

    Raises:
        RuntimeError: the server does not answer as the trainer's own model does.
    """
    scheme = make_scheme(job)
    if job.system == System.TORCHRL:
        spawn = torch.multiprocessing.get_context("spawn")
        scheme.init_on_sender(model_id="policy", model=policy.module, devices=[torch.device("cpu")], ctx=spawn)
        send = partial(scheme.send, policy.module)
    else:
        scheme.init_on_sender(model=policy.module)
        send = scheme.send
    with Partner(_serve, job, workload, scheme) as server:
        scheme.connect()
        _check(policy, send, server)
        yield send


def _check(policy: Policy, send: Callable[[], object], server: Partner) -> None:
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(1)
        request = policy.request()
        expected = policy.module(request.clone())["action"]
    send()
    action = torch.tensor(server.ask(request["observation"].tolist()))
    if not torch.allclose(action, expected, rtol=1e-4):
        raise RuntimeError(f"the server answered {action.tolist()} after send(), the model {expected.tolist()}")


# -- what the other process does ---------------------------------------------------------------------------


def _serve(pipe: Pipe, job: Job, workload: Workload, scheme: Any) -> None:
    """Serve the workload's model; answer observations with actions."""
    policy = Policy(workload.model, workload.weights)
    with serve_threads(job, policy.module, 1, weight_sync=scheme, swap=workload.swap) as (client,):
        pipe.send("ready")
        while True:
            observation = torch.tensor(pipe.recv())
            pipe.send(client(TensorDict({"observation": observation}))["action"].tolist())


def publish_on_demand(pipe: Pipe, workload: Workload, scheme: Any) -> None:
    """Publish the weights of the workload's model whenever asked; answer when that began and when it was done."""
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


def publish_steadily(pipe: Pipe, workload: Workload, scheme: Any) -> None:
    """After a message, publish at the workload's rate until the next one; answer how many times."""
    _connect(workload, scheme)
    pipe.send("ready")
    while True:
        pipe.recv()
        sent, due = 0, time.perf_counter()
        while not pipe.poll(max(0.0, due - time.perf_counter())):
            scheme.send()
            sent += 1
            due = max(due + 1 / workload.rate, time.perf_counter())  # what is late is not made good in a burst
        pipe.recv()
        pipe.send(sent)


def _connect(workload: Workload, scheme: Any) -> None:
    scheme.init_on_sender(model=Policy(workload.model, workload.weights).module)
    scheme.connect()
