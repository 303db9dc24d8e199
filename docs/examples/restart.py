"""A server's process is killed: its callers learn it at once, the next one listens at the same address."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    InferenceClient,
    MPTransport,
    PeerDiedError,
    ProcessInferenceServer,
    ServerClosedError,
    connect,
)


def make_policy() -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])


@contextmanager
def serving(address: Path) -> Iterator[ProcessInferenceServer]:
    """Start a server that listens at the address."""
    with ProcessInferenceServer(make_policy, MPTransport(address=str(address)), startup_timeout=60.0) as server:
        yield server


def ask(client: InferenceClient, patience: float = 60.0) -> TensorDictBase:
    """Ask until a server answers. A policy's request may be sent again: to compute it twice does no harm."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return client(TensorDict({"observation": torch.ones(4)}), timeout=5.0)
        except (PeerDiedError, ServerClosedError) as error:
            if time.monotonic() > deadline:
                raise
            print(f"{type(error).__name__}; asking again")
            time.sleep(0.5)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder, "policy")
        with serving(address) as server:
            client = connect(str(address)).client()
            print("the first server answers:", sorted(ask(client).keys()))
            os.kill(server.pid or 0, signal.SIGKILL)
            try:
                client(TensorDict({"observation": torch.ones(4)}), timeout=5.0)
            except (PeerDiedError, ServerClosedError) as error:
                print(f"{type(error).__name__}: {error}")
            print("its parent knows:", server.health().reason)
        with serving(address):
            print("the next server answers:", sorted(ask(client).keys()))


if __name__ == "__main__":
    main()
