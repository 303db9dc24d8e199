"""16 environments of Gymnasium on one event loop: observations become float32, and the policy is in eval mode."""

import asyncio
from typing import Any

import gymnasium
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, InferenceServer, ThreadingTransport


def make_policy() -> TensorDictModule:
    network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 2))
    policy = TensorDictModule(network, in_keys=["observation"], out_keys=["scores"])
    return policy.eval()  # the server leaves the mode as it is: in train mode, dropout would stay on


def observe(observation: Any) -> TensorDict:
    """Make a request. Environments often observe in float64, and a policy's weights are float32."""
    return TensorDict({"observation": torch.as_tensor(observation, dtype=torch.float32)})


async def play(client: AsyncInferenceClient, seed: int) -> float:
    """Play one episode."""
    with gymnasium.make("CartPole-v1") as environment:
        observation, _ = environment.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            reply = await client(observe(observation))
            observation, reward, terminated, truncated, _ = environment.step(int(reply["scores"].argmax()))
            total, done = total + float(reward), terminated or truncated
    return total


async def serve() -> None:
    async with InferenceServer(make_policy(), ThreadingTransport()) as server:
        client = server.async_client()
        returns = await asyncio.gather(*(play(client, seed) for seed in range(16)))
        print(f"{len(returns)} episodes, mean return {sum(returns) / len(returns):.1f}")
        print(f"{server.stats().mean_batch_size:.1f} requests in a forward pass")


if __name__ == "__main__":
    asyncio.run(serve())
