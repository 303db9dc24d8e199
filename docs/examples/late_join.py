"""Workers that were started separately: they know an address. One is killed, and the next one gets its slot."""

import subprocess
import sys

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ProcessSlotTransport, connect


def work(address: str) -> None:
    """What runs in a worker's process."""
    client = connect(address).client()
    while True:
        reply = client(TensorDict({"observation": torch.ones(4)}))
        print("version", int(reply["policy_version"]), flush=True)


def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    transport = ProcessSlotTransport(
        request_spec=TensorDict({"observation": torch.zeros(4)}),
        response_spec=TensorDict({"action": torch.zeros(2)}),
        num_slots=1,
    )
    with InferenceServer(policy, transport) as server:
        for name in ("first", "second"):
            command = [sys.executable, __file__, transport.address]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout is not None
                print(f"the {name} worker got a reply of", worker.stdout.readline(), end="")
                worker.kill()
            server.update_weights(policy)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1])
    else:
        main()
