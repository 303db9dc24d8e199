"""Two policies side by side: a tenth of the users gets the new one, each user always the same."""

import asyncio
import zlib

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, InferenceServer, ThreadingTransport

USERS, REQUESTS = 200, 5


def make_policy() -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])


def arm_of(user: str) -> str:
    """Choose by the name alone, as every process and every run does; ``hash`` would differ from run to run."""
    return "new" if zlib.crc32(user.encode()) % 100 < 10 else "old"


async def use(client: AsyncInferenceClient) -> list[float]:
    """What one user does: a reward for each action."""
    rewards = []
    for _ in range(REQUESTS):
        reply = await client(TensorDict({"observation": torch.ones(4)}))
        rewards.append(-float((reply["action"] - 1).abs().mean()))
    return rewards


async def serve() -> None:
    old = InferenceServer(make_policy(), ThreadingTransport(), policy_version=1)
    new = InferenceServer(make_policy(), ThreadingTransport(), policy_version=2)
    async with old, new:
        clients = {"old": old.async_client(), "new": new.async_client()}
        users = [f"user-{number}" for number in range(USERS)]
        outcomes = await asyncio.gather(*(use(clients[arm_of(user)]) for user in users))
        for arm, server in (("old", old), ("new", new)):
            rewards = [
                reward for user, got in zip(users, outcomes, strict=True) if arm_of(user) == arm for reward in got
            ]
            latency = server.stats().request.p95 * 1e3
            print(
                f"{arm}: {len(rewards)} requests, mean reward {sum(rewards) / len(rewards):.2f}, p95 {latency:.2f} ms"
            )


if __name__ == "__main__":
    asyncio.run(serve())
