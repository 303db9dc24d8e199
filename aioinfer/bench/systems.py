"""A running server of either system, and its clients. torchrl is used through its public API alone.

The thread or event loop of a caller owns its client; the servers run in threads of their own, but for ours with tasks,
whose event loop is that of the tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

import torch
from tensordict.nn import TensorDictModule

import aioinfer
from aioinfer import InferenceServer, PolicyClientModule, SlotTransport, ThreadingTransport
from aioinfer.bench.models import Policy
from aioinfer.bench.workloads import Job, System, named
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme


@dataclass(frozen=True, slots=True)
class TaskCaller:
    """The client of one task.

    Attributes:
        call: returns an awaitable of the reply.
        submit: returns a future of the reply.
    """

    call: Callable[[Any], Awaitable[Any]]
    submit: Callable[[Any], asyncio.Future[Any]]


def load_package(job: Job) -> Any:
    """Import and return the package of the job's system, so that no import disturbs the measurement of another job."""
    if job.system not in (System.TORCHRL, System.STACK):
        return aioinfer
    from torchrl.modules import inference_server

    return inference_server


def make_scheme(job: Job) -> Any:
    """Make a weight synchronisation scheme for one server. torchrl's makes its queues when its trainer begins."""
    if job.system == System.TORCHRL:
        from torchrl.weight_update import MultiProcessWeightSyncScheme as TorchrlScheme

        return TorchrlScheme()
    scheme = SharedMemWeightSyncScheme if job.way == "shared memory" else MultiProcessWeightSyncScheme
    return scheme(num_workers=1)


def make_server(
    job: Job, model: TensorDictModule, transport: Any, *, weight_sync: Any = None, swap: bool = False
) -> Any:
    """Make a server of the job's system, which runs in threads of this process.

    Args:
        job: names the system.
        model: the model to serve.
        transport: a transport of the system.
        weight_sync: a scheme of the system.
        swap: see ``swap_weights`` of our server.
    """
    options: dict[str, Any] = {"max_batch_size": named(job.workload).max_batch_size, "weight_sync": weight_sync}
    if job.system == System.OURS:
        return InferenceServer(model, transport, swap_weights=swap, **options)
    if job.system == System.STACK:
        options["collate_fn"] = torch.stack
    return load_package(job).InferenceServer(model, transport, **options)


@contextmanager
def serve_threads(
    job: Job, model: TensorDictModule, callers: int, **options: Any
) -> Iterator[list[Callable[[Any], Any]]]:
    """Serve ``model`` with the ``options`` of :func:`make_server`, and yield a blocking client for each caller."""
    with make_server(job, model, _make_transport(job, callers), **options) as server:
        clients = [server.client() for _ in range(callers)]
        if job.way == "policy module":
            yield [PolicyClientModule(client, in_keys=["observation"], out_keys=["action"]) for client in clients]
        else:
            yield clients


@asynccontextmanager
async def serve_tasks(
    job: Job, model: TensorDictModule, callers: int, **options: Any
) -> AsyncIterator[list[TaskCaller]]:
    """Serve ``model`` as :func:`serve_threads` does, and yield a client for each task of the running event loop."""
    server = make_server(job, model, _make_transport(job, callers), **options)
    if job.system == System.OURS:
        async with server:
            clients = [server.async_client() for _ in range(callers)]
            yield [TaskCaller(client, client.submit) for client in clients]
    elif job.way == "slots":
        # The futures of torchrl's slots can't be awaited, nor wrapped: a thread per slot blocks on them.
        with ThreadPoolExecutor(callers) as pool, server:
            yield [_call_in_thread(pool, server.client()) for _ in range(callers)]
    else:
        with server:
            yield [_wrap_futures(server.client()) for _ in range(callers)]


def make_process_transport(job: Job, policy: Policy, callers: int, context: BaseContext) -> Any:
    """Make a transport for callers in other processes, which get their clients before the server begins."""
    package = load_package(job)
    if job.way == "pickles":
        return package.MPTransport(context)
    rows = named(job.workload).rows
    options = {"rows": rows} if rows else {}
    return package.ProcessSlotTransport(policy.request(), policy.reply(), num_slots=callers, ctx=context, **options)


def make_process_clients(job: Job, transport: Any, callers: int, *, awaiting: bool) -> list[Any]:
    """Make the clients of one of these processes: blocking or awaitable ones. All of torchrl's block."""
    if job.system != System.OURS:
        return [transport.client() for _ in range(callers)]
    return list(transport.async_clients(callers) if awaiting else transport.clients(callers))


def _make_transport(job: Job, callers: int) -> Any:
    if job.system == System.OURS:
        return SlotTransport(callers) if job.way == "slots" else ThreadingTransport()
    package = load_package(job)
    return package.SlotTransport(callers) if job.way == "slots" else package.ThreadingTransport()


def _wrap_futures(client: Any) -> TaskCaller:
    def submit(td: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(client.submit(td))

    return TaskCaller(submit, submit)


def _call_in_thread(pool: ThreadPoolExecutor, client: Any) -> TaskCaller:
    loop = asyncio.get_running_loop()

    def submit(td: Any) -> asyncio.Future[Any]:
        return loop.run_in_executor(pool, client, td)

    return TaskCaller(submit, submit)
