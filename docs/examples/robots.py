"""Robots that ask a policy over a network, here three threads of this program, with a deadline for each action."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import uvicorn
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

import aioinfer
from aioinfer import InferenceClient, InferenceServer, ThreadingTransport
from aioinfer.web import create_app


class Policy(nn.Module):
    """From a joint state ``[B, 7]`` to actions ``[B, 10, 7]``: a horizon of 10 steps."""

    def forward(self, state: Tensor) -> Tensor:
        goal = -0.1 * state
        return goal[:, None, :] * torch.linspace(0.1, 1.0, 10)[:, None]


@contextmanager
def serving() -> Iterator[str]:
    """What ``aioinfer serve`` does, in a thread of this program; yields the address."""
    policy = TensorDictModule(Policy(), in_keys=["state"], out_keys=["actions"])
    with InferenceServer(policy, ThreadingTransport()) as server:
        web_server = uvicorn.Server(uvicorn.Config(create_app(server), port=0, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=web_server.run)
        thread.start()
        while not web_server.started:
            time.sleep(0.01)
        port = web_server.servers[0].sockets[0].getsockname()[1]
        yield f"ws://127.0.0.1:{port}"
        web_server.should_exit = True
        thread.join()


def drive(client: InferenceClient, name: str) -> None:
    """Replan every five steps: observe, ask for actions, execute half of them."""
    state = np.random.rand(7).astype(np.float32)
    for _ in range(20):
        try:
            actions = client(state=state, timeout=1.0)["actions"]  # [10, 7]
        except (TimeoutError, aioinfer.InferenceError) as error:
            print(f"{name} stands still: {error}")
            continue
        for action in actions[:5].numpy():
            state = state + action
    print(f"{name} ended at distance {np.linalg.norm(state):.4f}")


def main() -> None:
    with serving() as address, aioinfer.connect(address) as remote:
        robots = [threading.Thread(target=drive, args=(remote.client(), f"robot {number}")) for number in range(3)]
        for robot in robots:
            robot.start()
        for robot in robots:
            robot.join()


if __name__ == "__main__":
    main()
