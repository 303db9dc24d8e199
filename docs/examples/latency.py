"""The two settings that a latency-critical process makes before it serves."""

import gc
import time

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport


def main() -> None:
    torch.set_num_threads(1)  # a small policy is faster on one core than split over many
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(policy, ThreadingTransport()) as server:
        client = server.client()
        request = TensorDict({"observation": torch.randn(4)})
        client(request)  # the first forward pass is slow: torch sets things up for the later ones

        gc.collect()
        gc.freeze()  # later collections need not look through the objects that exist by now

        worst = 0.0
        for _ in range(1000):
            started = time.perf_counter()
            client(request, timeout=1.0)
            worst = max(worst, time.perf_counter() - started)
        print(f"p50 {server.stats().request.p50 * 1e3:.2f} ms, worst {worst * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
