"""A trainer in the server's own process: a task that learns while other tasks use what it has learnt."""

import asyncio
import copy

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, InferenceServer, ThreadingTransport

UPDATES = 50


def learn(policy: TensorDictModule, optimizer: torch.optim.Optimizer) -> None:
    """One step towards a policy that answers an observation with its negative."""
    observations = torch.randn(64, 4)
    loss = (policy.module(observations) + observations).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


async def train(server: InferenceServer, policy: TensorDictModule) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), 0.05)
    for _ in range(UPDATES):
        await asyncio.to_thread(learn, policy, optimizer)  # the event loop goes on meanwhile
        await server.aupdate_weights(policy)  # a copy of them is in use when it returns


async def play(client: AsyncInferenceClient, errors: dict[int, float]) -> None:
    while True:
        reply = await client(TensorDict({"observation": torch.ones(4)}))
        errors[int(reply["policy_version"])] = float((reply["action"] + 1).abs().mean())


async def serve() -> None:
    policy = TensorDictModule(nn.Linear(4, 4), in_keys=["observation"], out_keys=["action"])
    learner = copy.deepcopy(policy)  # the server's parameters are the server's: nobody else writes to them
    errors: dict[int, float] = {}
    async with InferenceServer(policy, ThreadingTransport()) as server:
        players = [asyncio.create_task(play(server.async_client(), errors)) for _ in range(8)]
        await train(server, learner)
        for player in players:
            player.cancel()
        await asyncio.gather(*players, return_exceptions=True)
        stats = server.stats()
    print(f"{stats.ok} replies while {stats.weight_updates} updates came")
    for version in (min(errors), max(errors)):
        print(f"version {version}: the action was off by {errors[version]:.2f}")


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
