"""The policy on a GPU where there is one; callers keep their observations in host memory."""

import asyncio

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport


async def serve() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    policy = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(policy, ThreadingTransport(), device=device) as server:
        client = server.async_client()
        requests = [TensorDict({"observation": torch.randn(64)}) for _ in range(64)]
        replies = await asyncio.gather(*map(client, requests))
    print(f"computed on {device}, replies on {replies[0]['action'].device}")


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
