"""A vectorised environment of Gymnasium asks for the actions of all its environments with one request."""

import threading

import gymnasium
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport

ENVIRONMENTS, STEPS = 8, 50


def make_policy() -> TensorDictModule:
    network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    return TensorDictModule(network, in_keys=["observation"], out_keys=["scores"])


def collect(server: InferenceServer, seed: int) -> None:
    """Step a group of environments, all at once."""
    environments = gymnasium.make_vec("CartPole-v1", num_envs=ENVIRONMENTS, vectorization_mode="sync")
    with server.client() as client:
        observations, _ = environments.reset(seed=seed)
        for _ in range(STEPS):
            rows = torch.as_tensor(observations, dtype=torch.float32)  # [8, 4]
            reply = client(TensorDict({"observation": rows}, batch_size=[ENVIRONMENTS]))
            assert reply["scores"].shape == (ENVIRONMENTS, 2)
            observations, *_ = environments.step(reply["scores"].argmax(-1).numpy())
    environments.close()


def main() -> None:
    with InferenceServer(make_policy(), ThreadingTransport(), max_batch_size=64) as server:
        groups = [threading.Thread(target=collect, args=(server, seed)) for seed in range(3)]
        for group in groups:
            group.start()
        for group in groups:
            group.join()
        stats = server.stats()
        print(f"{stats.ok} requests of {ENVIRONMENTS} rows, {stats.mean_batch_size:.1f} rows in a forward pass")


if __name__ == "__main__":
    main()
