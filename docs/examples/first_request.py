"""One request and one reply."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport


def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(policy, ThreadingTransport()) as server:
        client = server.client()
        reply = client(TensorDict({"observation": torch.randn(4)}))
        print("action:", reply["action"])


if __name__ == "__main__":
    main()
