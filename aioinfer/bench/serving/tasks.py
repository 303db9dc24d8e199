"""Tasks in another process than the server: over a WebSocket, or over process slots."""

from __future__ import annotations

import asyncio

import aioinfer
from aioinfer.bench import load_generators as load
from aioinfer.bench import requests
from aioinfer.bench.models import Policy
from aioinfer.bench.report import Figures
from aioinfer.bench.serving.servers import RunningServer
from aioinfer.bench.systems import TaskCaller
from aioinfer.bench.workloads import Job, RequestKind, Serving, System, named

__all__ = ["measure"]


def measure(job: Job, serving: Serving, server: RunningServer) -> Figures:
    """``rate`` of tasks in a closed loop, which send observations by name."""
    address = server.address if job.system == System.SLOTS else f"ws://127.0.0.1:{server.port}"
    return asyncio.run(_measure(job, address))


async def _measure(job: Job, address: str) -> Figures:
    workload = named(job.workload)
    policy = Policy(workload.model)
    remote = await asyncio.to_thread(aioinfer.connect, address)
    clients = remote.async_clients(workload.callers)
    callers = [TaskCaller(requests.awaiting(RequestKind.ARRAY, client), client.submit) for client in clients]
    prepared = [requests.prepare(RequestKind.ARRAY, policy.request()) for _ in clients]
    return {"rate": await load.task_rate(callers, prepared, job.warm_up, job.seconds)}
