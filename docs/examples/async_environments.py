"""Sixteen robots whose reset and step are coroutines, one of them slow: batches of what is complete first."""

import asyncio
import random
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer.collectors import AsyncBatchedCollector


class Robot:
    """Drives to the origin. While it waits for its motors, in ``await``, other robots go on."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.position: NDArray[np.float32] = np.zeros(2, np.float32)

    async def reset(self, *, seed: int | None = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        if seed is not None:  # once, at the beginning
            self.random = random.Random(seed)
        self.position = np.array([self.random.uniform(-1, 1), self.random.uniform(-1, 1)], np.float32)
        return self.position, {}

    async def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        await asyncio.sleep(self.random.uniform(0.5, 1.5) * self.seconds)
        self.position = self.position + 0.1 * action
        distance = float(np.hypot(*self.position))
        return self.position, -distance, distance < 0.1, False, {}

    async def close(self) -> None:
        """Called at the end, and when it is made again."""


def train(batch: TensorDictBase) -> None:
    """Stands for a step of training: in a thread, so that the robots' event loop goes on."""


async def collect() -> None:
    fragments = torch.zeros(16, dtype=torch.int64)
    robots = [Robot(0.05), *[Robot(0.005) for _ in range(15)]]
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
    policy = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
    async with AsyncBatchedCollector(
        robots, policy=policy, frames_per_batch=256, fragment_length=16, total_frames=4096, order="first"
    ) as collector:
        async for batch in collector:
            await asyncio.to_thread(train, batch)
            fragments += batch["collector", "env"][:, 0].bincount(minlength=16)
        stats = collector.stats()
    print(f"fragments of the slow robot: {fragments[0]}, of another: {fragments[1]}")
    print(f"{stats.frames_per_second:.0f} steps/s, limited by the {stats.limited_by}; a step takes", end=" ")
    print(f"{stats.step_seconds[0].p50:.3f} s and {stats.step_seconds[1].p50:.3f} s")


if __name__ == "__main__":
    asyncio.run(collect())
