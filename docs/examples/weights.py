"""A trainer in a process of its own publishes weights to a server, which serves meanwhile."""

import multiprocessing
import time

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.weight_sync import MultiProcessWeightSyncScheme

UPDATES = 50


def make_policy() -> TensorDictModule:
    """The server and the trainer make one each, so that the weights of one fit the other."""
    return TensorDictModule(nn.Linear(4, 4), in_keys=["observation"], out_keys=["action"])


def train(scheme: MultiProcessWeightSyncScheme) -> None:
    """What runs in the trainer's process: learn to answer an observation with its negative."""
    policy = make_policy()
    optimizer = torch.optim.Adam(policy.parameters(), 0.05)
    scheme.init_on_sender(model=policy)
    scheme.connect(timeout=60.0)  # publishes the first weights, and waits until the server has come and uses them
    for _ in range(UPDATES):
        observations = torch.randn(64, 4)
        loss = (policy.module(observations) + observations).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheme.send()  # returns when the server computes with these weights
    scheme.shutdown()


def main() -> None:
    scheme = MultiProcessWeightSyncScheme(num_workers=1)  # makes the queue, ahead of the process
    trainer = multiprocessing.get_context("spawn").Process(target=train, args=(scheme,), daemon=True)
    trainer.start()
    with InferenceServer(make_policy(), ThreadingTransport(), weight_sync=scheme) as server:
        client = server.client()
        errors: dict[int, float] = {}
        while trainer.is_alive():
            reply = client(TensorDict({"observation": torch.ones(4)}))
            errors[int(reply["policy_version"])] = float((reply["action"] + 1).abs().mean())
            time.sleep(0.001)
        stats = server.stats()
    print(f"{stats.ok} replies while {stats.weight_updates} updates came, {stats.refused_updates} refused")
    for version in (min(errors), max(errors)):
        print(f"version {version}: the action was off by {errors[version]:.2f}")
    print("the trainer's exit code:", trainer.exitcode)


if __name__ == "__main__":
    main()
