"""Threads, and tasks of two event loops, all on one server."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport

STEPS = 100


def ask_from_thread(server: InferenceServer) -> int:
    client = server.client()
    replies = [client(TensorDict({"observation": torch.randn(4)})) for _ in range(STEPS)]
    return len(replies)


async def ask_from_tasks(server: InferenceServer, tasks: int) -> int:
    client = server.async_client()

    async def ask() -> int:
        replies = [await client(TensorDict({"observation": torch.randn(4)})) for _ in range(STEPS)]
        return len(replies)

    return sum(await asyncio.gather(*(ask() for _ in range(tasks))))


async def serve() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    loop = asyncio.get_running_loop()
    async with InferenceServer(policy, ThreadingTransport()) as server:
        with ThreadPoolExecutor(5) as pool:
            threads = [loop.run_in_executor(pool, ask_from_thread, server) for _ in range(4)]
            # A second event loop, in a thread of its own.
            elsewhere = loop.run_in_executor(pool, lambda: asyncio.run(ask_from_tasks(server, 16)))
            here = ask_from_tasks(server, 32)
            counts = await asyncio.gather(here, elsewhere, *threads)
        stats = server.stats()
    print(f"{sum(counts)} replies: {counts[0]} here, {counts[1]} in the other loop, {sum(counts[2:])} in threads")
    print(f"{stats.ok} requests in {sum(stats.batches.values())} forward passes")


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
