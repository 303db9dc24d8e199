"""A server in a process of its own, workers in others, and a trainer in this one."""

import multiprocessing

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceClient, MPTransport, ProcessInferenceServer


def make_policy() -> TensorDictModule:
    """Runs in the server's process; the trainer makes one of its own."""
    return TensorDictModule(nn.Linear(4, 2, bias=False), in_keys=["observation"], out_keys=["action"])


def work(client: InferenceClient) -> None:
    """What runs in a worker's process."""
    reply = client(TensorDict({"observation": torch.ones(4)}))
    print(f"action {reply['action'].tolist()}, computed by version {int(reply['policy_version'])}")


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessInferenceServer(make_policy, MPTransport(), max_batch_size=32) as server:
        policy = make_policy()
        for parameter in policy.parameters():
            nn.init.constant_(parameter, 0.5)
        server.update_weights(policy)
        workers = [context.Process(target=work, args=(server.client(),)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print("requests answered:", server.stats().ok)
        print("alive and ready:", (server.health().alive, server.health().ready))
    print("afterwards:", server.health().reason)


if __name__ == "__main__":
    main()
