"""Tasks, threads and processes on one server: as long as the processes ask, tasks and threads here ask too."""

import asyncio
import multiprocessing
import threading
from multiprocessing.process import BaseProcess

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, InferenceClient, InferenceServer, ProcessSlotTransport, ThreadingTransport

TASKS, THREADS, PROCESSES, STEPS = 16, 2, 2, 250


def observe() -> TensorDict:
    return TensorDict({"observation": torch.randn(4)})


def work(client: InferenceClient) -> None:
    """What runs in a worker's process."""
    for _ in range(STEPS):
        client(observe())


async def ask(client: AsyncInferenceClient, ended: threading.Event) -> int:
    """A task, here."""
    replies = 0
    while not ended.is_set():
        await client(observe())
        replies += 1
    return replies


def ask_and_block(client: InferenceClient, ended: threading.Event) -> int:
    """A thread, here."""
    replies = 0
    while not ended.is_set():
        client(observe())
        replies += 1
    return replies


def wait_for(workers: list[BaseProcess], ended: threading.Event) -> int:
    for worker in workers:
        worker.join()
    ended.set()
    return len(workers) * STEPS


async def serve() -> None:
    here = ThreadingTransport()
    elsewhere = ProcessSlotTransport(
        request_spec=observe(), response_spec=TensorDict({"action": torch.zeros(2)}), num_slots=PROCESSES
    )
    context, ended = multiprocessing.get_context("spawn"), threading.Event()
    workers: list[BaseProcess] = [
        context.Process(target=work, args=(elsewhere.client(),), daemon=True) for _ in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(policy, [here, elsewhere]) as server:
        counts = await asyncio.gather(
            asyncio.to_thread(wait_for, workers, ended),
            *[asyncio.to_thread(ask_and_block, here.client(), ended) for _ in range(THREADS)],
            *[ask(here.async_client(), ended) for _ in range(TASKS)],
        )
        stats = server.stats()
    in_processes, in_threads, in_tasks = counts[0], sum(counts[1 : THREADS + 1]), sum(counts[THREADS + 1 :])
    print(f"{in_tasks} replies to tasks, {in_threads} to threads, {in_processes} to processes")
    print(f"{stats.ok} requests in {sum(stats.batches.values())} forward passes")


if __name__ == "__main__":
    asyncio.run(serve())
