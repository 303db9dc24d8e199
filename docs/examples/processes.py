"""Three processes, each with an environment of its own, ask one server. Name a start method: spawn, or fork."""

import multiprocessing
import os
import sys

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceClient, InferenceServer, ProcessSlotTransport

WORKERS, STEPS = 3, 250


def work(client: InferenceClient) -> None:
    """What runs in a worker's process."""
    torch.set_num_threads(1)
    observation = torch.zeros(4)
    for _ in range(STEPS):
        reply = client(TensorDict({"observation": observation}))
        observation = observation + 0.1 * reply["action"]  # stands for an environment's step
    print(f"process {os.getpid()} took {STEPS} steps")


def main(start_method: str = "spawn") -> None:
    multiprocessing.set_start_method(start_method)
    transport = ProcessSlotTransport(
        request_spec=TensorDict({"observation": torch.zeros(4)}),  # shaped as one request is
        response_spec=TensorDict({"action": torch.zeros(4)}),  # shaped as its reply is
        num_slots=WORKERS,
    )
    workers = [multiprocessing.Process(target=work, args=(transport.client(),), daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    policy = TensorDictModule(nn.Linear(4, 4), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(policy, transport) as server:
        for worker in workers:
            worker.join()
        stats = server.stats()
    print(f"{stats.ok} replies in {sum(stats.batches.values())} forward passes")


if __name__ == "__main__":
    main(*sys.argv[1:])
