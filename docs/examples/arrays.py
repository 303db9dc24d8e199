"""A plain PyTorch module, called with the numpy arrays of an environment: no TensorDict in sight."""

import asyncio

import numpy as np
import torch
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport

ROBOTS, STEPS = 16, 50


class Policy(nn.Module):
    """Steers by an image and the speed."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(3, 8, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 32))
        self.act = nn.Linear(32 + 2, 2)

    def forward(self, image: torch.Tensor, speed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.act(torch.cat([self.see(image.float() / 255), speed], dim=-1))  # [B, 2]
        return scores.argmax(-1), scores


async def drive(server: InferenceServer, seed: int) -> int:
    """One robot: a camera image and its speed, again and again."""
    client, random, right = server.async_client(), np.random.default_rng(seed), 0
    for _ in range(STEPS):
        image = random.integers(0, 256, (3, 16, 16), dtype=np.uint8)
        reply = await client(image=image, speed=np.zeros(2, np.float32))
        right += int(reply["action"])
    return right


async def main() -> None:
    async with InferenceServer(
        Policy(), ThreadingTransport(), in_keys=["image", "speed"], out_keys=["action", "scores"]
    ) as server:
        right = await asyncio.gather(*[drive(server, seed) for seed in range(ROBOTS)])
        stats = server.stats()
        print(f"{sum(right)} of {stats.ok} to the right; {stats.mean_batch_size:.1f} rows in a forward pass")


if __name__ == "__main__":
    asyncio.run(main())
