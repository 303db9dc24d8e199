"""An environment whose step takes 2 ms: a process for each core, each with eight environments on an event loop."""

import asyncio
import multiprocessing
import time
from typing import Any

import gymnasium
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, InferenceServer, ProcessSlotTransport

PROCESSES, ENVIRONMENTS, STEPS = 2, 8, 50


class Slow(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Stands for an environment that computes for 2 ms."""

    def step(self, action: Any) -> Any:
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end:
            pass
        return super().step(action)


async def play(client: AsyncInferenceClient, seed: int) -> None:
    with Slow(gymnasium.make("CartPole-v1")) as environment:
        observation, _ = environment.reset(seed=seed)
        for _ in range(STEPS):
            reply = await client(TensorDict({"observation": torch.as_tensor(observation, dtype=torch.float32)}))
            observation, _, terminated, truncated, _ = environment.step(int(reply["scores"].argmax()))
            if terminated or truncated:
                observation, _ = environment.reset()


async def play_all(clients: list[AsyncInferenceClient]) -> None:
    await asyncio.gather(*(play(client, seed) for seed, client in enumerate(clients)))


def work(clients: list[AsyncInferenceClient]) -> None:
    """What runs in a worker's process."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    asyncio.run(play_all(clients))
    print(f"{len(clients) * STEPS / (time.perf_counter() - started):.0f} steps per second")


def main() -> None:
    transport = ProcessSlotTransport(
        request_spec=TensorDict({"observation": torch.zeros(4)}),
        response_spec=TensorDict({"scores": torch.zeros(2)}),
        num_slots=PROCESSES * ENVIRONMENTS,
    )
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(transport.async_clients(ENVIRONMENTS),), daemon=True)
        for _ in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["scores"]).eval()
    with InferenceServer(policy, transport) as server:
        for worker in workers:
            worker.join()
        print(f"{server.stats().ok} requests, {server.stats().mean_batch_size:.1f} in a forward pass")


if __name__ == "__main__":
    main()
