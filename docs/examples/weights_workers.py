"""A trainer that starts its workers, each in a process of its own: a server, and one that only follows the weights."""

import multiprocessing
from multiprocessing.synchronize import Event

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.weight_sync import MultiProcessWeightSyncScheme


def make_policy() -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, 1, bias=False), in_keys=["observation"], out_keys=["action"])


@torch.no_grad()
def learn(policy: TensorDictModule, step: int) -> None:
    """Stands for what a trainer does."""
    for parameter in policy.parameters():
        parameter.fill_(step)


def serve(scheme: MultiProcessWeightSyncScheme, end: Event) -> None:
    """Worker 0: a server, which receives by itself."""
    with InferenceServer(make_policy(), ThreadingTransport(), weight_sync=scheme) as server:
        end.wait()
        reply = server.client()(TensorDict({"observation": torch.ones(4)}))
        print(f"the server's last action {float(reply['action']):g}, by version {int(reply['policy_version'])}")


def follow(scheme: MultiProcessWeightSyncScheme, end: Event) -> None:
    """Worker 1: receives where it calls ``receive``."""
    policy = make_policy()
    scheme.init_on_receiver(model_id="policy", model=policy)
    scheme.connect()  # waits for the first weights
    while not end.is_set():
        scheme.receive(timeout=0.1)
    print(f"the follower's last weight {float(next(policy.parameters()).detach()[0, 0]):g}")
    scheme.shutdown()


def main() -> None:
    policy = make_policy()
    scheme = MultiProcessWeightSyncScheme()
    scheme.init_on_sender(model=policy, num_workers=2)  # makes the queues, ahead of the processes
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    workers = [
        context.Process(target=target, args=(scheme.for_worker(index), end), daemon=True)
        for index, target in enumerate((serve, follow))
    ]
    for worker in workers:
        worker.start()
    scheme.connect(version=0, timeout=60.0)  # waits until both have come
    for step in range(1, 11):
        learn(policy, step)
        scheme.send(version=step)  # returns when both use these weights
    end.set()
    for worker in workers:
        worker.join()
    scheme.shutdown()


if __name__ == "__main__":
    main()
