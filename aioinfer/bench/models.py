"""The models that are served, and requests for them."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer.bench.workloads import WeightSet

_LAYERS: dict[str, tuple[list[int], type[nn.Module]]] = {
    "tiny": ([4, 2], nn.Identity),
    "mlp": ([64, 256, 256, 8], nn.Tanh),
    "big": ([256, 1024, 1024, 1024, 16], nn.ReLU),
    "slow": ([4, 2], nn.Identity),
}
_IMAGE = (3, 84, 84)
_PASS_TIME = 0.01
"""Seconds of a pass of the slow model, whatever the batch, during which it uses neither the GIL nor a core."""
_STEP_OPERATORS = 16


class Policy:
    """One of the models ``tiny``, ``mlp``, ``big``, ``slow`` and ``cnn``, with requests for it.

    Args:
        name: the model's name.
        weights: the size of all its parameters; the added ones take no part in a forward pass.
    """

    def __init__(self, name: str, weights: WeightSet | None = None) -> None:
        network: nn.Module
        self._inputs: tuple[int, ...]
        self._sees = name == "cnn"
        if self._sees:
            network, self._inputs, self._outputs = _convolutions(8), _IMAGE, 8
        else:
            widths, activation = _LAYERS[name]
            network, self._inputs, self._outputs = _dense(widths, activation), (widths[0],), widths[-1]
        if name == "slow":
            network = nn.Sequential(_Device(), network)
        self.module = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
        if weights is not None:
            self.module.ballast = _ballast(self.module, weights)

    def request(self, *rows: int) -> TensorDict:
        """One request with a random observation ``[*obs]``, or a ready batch ``[rows, *obs]``."""
        shape = (*rows, *self._inputs)
        observation = torch.randint(256, shape, dtype=torch.uint8) if self._sees else torch.randn(shape)
        return TensorDict({"observation": observation}, batch_size=rows)

    def reply(self, *rows: int) -> TensorDict:
        """An example of a reply, to a request with as many rows."""
        return TensorDict({"action": torch.zeros(*rows, self._outputs)}, batch_size=rows)

    def check(self, reply: TensorDict, *rows: int) -> None:
        """Make sure that a reply is one: a system that answers wrongly is not worth measuring."""
        action, expected = reply["action"], [*rows, self._outputs]
        if list(action.shape) != expected:
            raise RuntimeError(f"the action has shape {list(action.shape)}, expected {expected}")


def step_environments(request: TensorDict, reply: TensorDict) -> None:
    """Make the next request ``[rows]`` of its environments: about as many operators as a vectorised one needs."""
    observation = request["observation"]
    force = reply["action"].mean(-1, keepdim=True)
    for _ in range(_STEP_OPERATORS):
        observation.add_(force, alpha=0.02).clamp_(-1, 1)


def _dense(widths: list[int], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    layers.pop()  # none after the last
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _convolutions(outputs: int) -> nn.Module:
    return nn.Sequential(
        _Brightness(),
        nn.Conv2d(_IMAGE[0], 16, 8, 4),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 9 * 9, outputs),
    )


class _Brightness(nn.Module):
    """From 0 to 1, of bytes."""

    def forward(self, image: Tensor) -> Tensor:
        return image.float().div_(255)


class _Device(nn.Module):
    """Stands for a pass on another device: the thread sleeps."""

    def forward(self, inputs: Tensor) -> Tensor:
        time.sleep(_PASS_TIME)
        return inputs


def _ballast(module: nn.Module, weights: WeightSet) -> nn.ParameterList:
    """Parameters that bring ``module`` up to its size. Each of their pages is written, so that it exists."""
    own = [parameter.numel() for parameter in module.parameters()]
    lacking, tensors = weights.nbytes // 4 - sum(own), weights.tensors - len(own)
    cuts = [lacking * index // tensors for index in range(tensors + 1)]
    return nn.ParameterList(nn.Parameter(torch.ones(end - start)) for start, end in pairwise(cuts))
