"""Two processes with 16 environments each, which an event loop drives: one connection, one send for each tick."""

import asyncio
import multiprocessing
import os
import sys

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, InferenceServer, ProcessSlotTransport

WORKERS, ENVIRONMENTS, STEPS = 2, 16, 100


async def play(client: AsyncInferenceClient) -> None:
    """One environment."""
    observation = torch.zeros(4)
    for _ in range(STEPS):
        reply = await client(TensorDict({"observation": observation}))
        observation = observation + 0.1 * reply["action"]


async def play_all(clients: list[AsyncInferenceClient]) -> None:
    await asyncio.gather(*map(play, clients))


def work(clients: list[AsyncInferenceClient]) -> None:
    """What runs in a worker's process."""
    torch.set_num_threads(1)
    asyncio.run(play_all(clients))
    print(f"process {os.getpid()} took {STEPS} steps in {len(clients)} environments")


def main(start_method: str = "spawn") -> None:
    multiprocessing.set_start_method(start_method)
    transport = ProcessSlotTransport(
        request_spec=TensorDict({"observation": torch.zeros(4)}),
        response_spec=TensorDict({"action": torch.zeros(4)}),
        num_slots=WORKERS * ENVIRONMENTS,
    )
    workers = [
        multiprocessing.Process(target=work, args=(transport.async_clients(ENVIRONMENTS),), daemon=True)
        for _ in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    policy = TensorDictModule(nn.Linear(4, 4), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(policy, transport) as server:
        for worker in workers:
            worker.join()
        stats = server.stats()
    print(f"{stats.ok} replies, {stats.mean_batch_size:.1f} in a forward pass")


if __name__ == "__main__":
    main(*sys.argv[1:])
