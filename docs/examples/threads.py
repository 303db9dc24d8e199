"""Eight plain threads share one policy; nothing here knows of an event loop."""

from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceClient, InferenceServer, ThreadingTransport


def drive(client: InferenceClient, steps: int) -> float:
    """Steer one robot for a while: observe, ask for an action, move."""
    observation = torch.randn(4)
    for _ in range(steps):
        reply = client(TensorDict({"observation": observation}), timeout=5.0)
        observation = 0.9 * observation + 0.1 * reply["action"]
    return float(observation.norm())


def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 4), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(policy, ThreadingTransport()) as server, ThreadPoolExecutor(8) as threads:
        client = server.client()
        robots = [threads.submit(drive, client, 200) for _ in range(8)]
        for number, robot in enumerate(robots):
            print(f"robot {number} ended at distance {robot.result():.2f}")
        print(f"mean batch size {server.stats().mean_batch_size:.1f}")


if __name__ == "__main__":
    main()
