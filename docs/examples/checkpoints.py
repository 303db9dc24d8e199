"""Checkpoints of one network, saved with and without ``module.`` in their names, loaded by a running server."""

import tempfile
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer import InferenceServer, ThreadingTransport, WeightSyncError


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))


def make_policy(network: nn.Module) -> TensorDictModule:
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


def load(path: Path) -> dict[str, Tensor]:
    """Read a state dict under the names that a ``TensorDictModule`` has: ``module.`` in front of the network's."""
    state = torch.load(path, weights_only=True)
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {f"module.{name}": tensor for name, tensor in state.items()}


def main() -> None:
    trained = make_network()
    with tempfile.TemporaryDirectory() as folder:
        bare, wrapped = Path(folder, "bare.pt"), Path(folder, "wrapped.pt")
        torch.save(trained.state_dict(), bare)  # 0.weight, 0.bias, ...
        torch.save(make_policy(trained).state_dict(), wrapped)  # module.0.weight, module.0.bias, ...

        with InferenceServer(make_policy(make_network()), ThreadingTransport()) as server:
            client = server.client()
            try:
                server.update_weights(torch.load(bare, weights_only=True))
            except WeightSyncError as error:
                print("as it is:", error)
            for version, path in ((100, bare), (200, wrapped)):
                server.update_weights(load(path), version=version)
                reply = client(TensorDict({"observation": torch.ones(4)}))
                print(f"{path.name}: action {float(reply['action'][0]):.3f}, by version {int(reply['policy_version'])}")


if __name__ == "__main__":
    main()
