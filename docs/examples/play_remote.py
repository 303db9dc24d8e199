"""Play CartPole with the actions of a server elsewhere: ``python play_remote.py ws://localhost:8000``."""

import asyncio
import sys

import gymnasium

import aioinfer
from aioinfer import AsyncInferenceClient


async def play(client: AsyncInferenceClient, seed: int) -> float:
    """Play one episode; return its length."""
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        reply = await client(observation=observation, timeout=5.0)
        observation, reward, terminated, truncated, _ = environment.step(int(reply["action"]))
        total, ended = total + float(reward), terminated or truncated
    environment.close()
    return total


async def main(url: str) -> None:
    with await asyncio.to_thread(aioinfer.connect, url) as remote:
        lengths = await asyncio.gather(*(play(client, seed) for seed, client in enumerate(remote.async_clients(16))))
    print(f"{len(lengths)} episodes, {sum(lengths) / len(lengths):.1f} steps on average")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
