"""64 environments, each a coroutine that awaits its actions, share one policy."""

import asyncio
import random

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer import AsyncInferenceClient, InferenceServer, ThreadingTransport


class Cart:
    """A cart on a line, pushed to the left (action 0) or to the right (action 1). It shall stay near 0."""

    def reset(self) -> Tensor:
        self.position, self.velocity, self.steps = random.uniform(-1, 1), 0.0, 0
        return self._observe()

    def step(self, action: int) -> tuple[Tensor, float, bool]:
        self.velocity += 0.1 if action == 1 else -0.1
        self.position += 0.1 * self.velocity
        self.steps += 1
        return self._observe(), -abs(self.position), self.steps == 100

    def _observe(self) -> Tensor:
        return torch.tensor([self.position, self.velocity])


class Policy(nn.Module):
    """Scores both actions and takes the better one."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, observation: Tensor) -> Tensor:
        scores: Tensor = self.scores(observation)  # [B, 2]
        return scores.argmax(-1)  # [B]


async def play(client: AsyncInferenceClient) -> float:
    """Play one episode. It reads as if the environment had the policy for itself."""
    environment = Cart()
    observation, total, done = environment.reset(), 0.0, False
    while not done:
        reply = await client(TensorDict({"observation": observation}))
        observation, reward, done = environment.step(int(reply["action"]))
        total += reward
    return total


async def serve() -> None:
    policy = TensorDictModule(Policy(), in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(policy, ThreadingTransport(), max_batch_size=64) as server:
        client = server.async_client()
        returns = await asyncio.gather(*(play(client) for _ in range(64)))
        stats = server.stats()
    print(f"{len(returns)} episodes, mean return {sum(returns) / len(returns):.1f}")
    print(f"{stats.ok} requests in {sum(stats.batches.values())} forward passes")


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
