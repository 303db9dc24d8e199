"""A running server of either system, its callers, and its trainer. torchrl is used through its public API alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

import torch
from tensordict.nn import TensorDictModule

import aioinfer
from aioinfer import InferenceServer, SlotTransport, ThreadingTransport
from aioinfer.bench.models import Policy
from aioinfer.bench.workloads import MAX_BATCH_SIZE, Job, System
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme

__all__ = [
    "TaskCaller",
    "make_process_clients",
    "make_process_transport",
    "make_scheme",
    "prepare",
    "serve_processes",
    "serve_tasks",
    "serve_threads",
]


@dataclass(frozen=True, slots=True)
class TaskCaller:
    """What one task holds.

    Attributes:
        call: the reply, to be awaited.
        submit: the reply's future.
    """

    call: Callable[[Any], Awaitable[Any]]
    submit: Callable[[Any], asyncio.Future[Any]]


def prepare(job: Job) -> None:
    """Import what the measurement needs, so that nothing is imported while others are measured."""
    if job.system == System.TORCHRL:
        import torchrl.modules.inference_server  # noqa: F401


def make_scheme(job: Job) -> Any:
    """A scheme for one worker. One of torchrl's makes its queues when its trainer begins."""
    if job.system == System.TORCHRL:
        from torchrl.weight_update import MultiProcessWeightSyncScheme as TorchrlScheme

        return TorchrlScheme()
    scheme = SharedMemWeightSyncScheme if job.way == "shared memory" else MultiProcessWeightSyncScheme
    return scheme(num_workers=1)


@contextmanager
def serve_threads(
    job: Job, model: TensorDictModule, callers: int, *, weight_sync: Any = None, swap: bool = False
) -> Iterator[list[Callable[[Any], Any]]]:
    """Serve ``model``, and yield a blocking client for each caller.

    Args:
        job: names the system, and the transport.
        model: what is served.
        callers: how many clients there are.
        weight_sync: a scheme of the system.
        swap: see ``swap_weights`` of our server.
    """
    if job.system == System.TORCHRL:
        server = _torchrl(job, model, callers, weight_sync)
    else:
        server = _ours(job, model, callers, weight_sync, swap)
    with server:
        yield [server.client() for _ in range(callers)]


@asynccontextmanager
async def serve_tasks(
    job: Job, model: TensorDictModule, callers: int, *, weight_sync: Any = None, swap: bool = False
) -> AsyncIterator[list[TaskCaller]]:
    """Serve ``model`` to the tasks of the running event loop, and yield what each of them needs."""
    if job.system == System.OURS:
        async with _ours(job, model, callers, weight_sync, swap) as server:
            clients = [server.async_client() for _ in range(callers)]
            yield [TaskCaller(client, client.submit) for client in clients]
    elif job.way == "slots":
        # The futures of torchrl's slots can't be awaited, nor wrapped: a thread per slot blocks on them.
        with ThreadPoolExecutor(callers) as pool, _torchrl(job, model, callers, weight_sync) as server:
            yield [_in_thread(pool, server.client()) for _ in range(callers)]
    else:
        with _torchrl(job, model, callers, weight_sync) as server:
            yield [_wrapped(server.client()) for _ in range(callers)]


def make_process_transport(job: Job, policy: Policy, callers: int, context: BaseContext) -> Any:
    """A transport for callers in other processes, which are given its clients before the server begins."""
    system: Any = aioinfer
    if job.system == System.TORCHRL:
        from torchrl.modules import inference_server as torchrl

        system = torchrl
    if job.way == "pickles":
        return system.MPTransport(context)
    return system.ProcessSlotTransport(policy.request(), policy.reply(), num_slots=callers, ctx=context)


def make_process_clients(job: Job, transport: Any, callers: int, *, awaiting: bool) -> list[Any]:
    """What one of these processes is given: clients that block, or can be awaited. All of torchrl's block."""
    if job.system == System.TORCHRL:
        return [transport.client() for _ in range(callers)]
    return list(transport.async_clients(callers) if awaiting else transport.clients(callers))


def serve_processes(job: Job, model: TensorDictModule, transport: Any) -> AbstractContextManager[Any]:
    """A server in threads of this process."""
    server: AbstractContextManager[Any] = (
        _torchrl_server(job, model, transport, None)
        if job.system == System.TORCHRL
        else _our_server(model, transport, None, swap=False)
    )
    return server


def _ours(job: Job, model: TensorDictModule, callers: int, weight_sync: Any, swap: bool) -> InferenceServer:
    return _our_server(model, SlotTransport(callers) if job.way == "slots" else ThreadingTransport(), weight_sync, swap)


def _our_server(model: TensorDictModule, transport: Any, weight_sync: Any, swap: bool) -> InferenceServer:
    return InferenceServer(model, transport, max_batch_size=MAX_BATCH_SIZE, weight_sync=weight_sync, swap_weights=swap)


def _torchrl(job: Job, model: TensorDictModule, callers: int, weight_sync: Any) -> Any:
    from torchrl.modules import inference_server as torchrl

    transport = torchrl.SlotTransport(callers) if job.way == "slots" else torchrl.ThreadingTransport()
    return _torchrl_server(job, model, transport, weight_sync)


def _torchrl_server(job: Job, model: TensorDictModule, transport: Any, weight_sync: Any) -> Any:
    from torchrl.modules import inference_server as torchrl

    collate = {"collate_fn": torch.stack} if job.torchrl_collate == "stack" else {}
    return torchrl.InferenceServer(model, transport, max_batch_size=MAX_BATCH_SIZE, weight_sync=weight_sync, **collate)


def _wrapped(client: Any) -> TaskCaller:
    def submit(td: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(client.submit(td))

    return TaskCaller(submit, submit)


def _in_thread(pool: ThreadPoolExecutor, client: Any) -> TaskCaller:
    loop = asyncio.get_running_loop()

    def submit(td: Any) -> asyncio.Future[Any]:
        return loop.run_in_executor(pool, client, td)

    return TaskCaller(submit, submit)
