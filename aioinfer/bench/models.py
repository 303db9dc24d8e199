"""The models that are served, and requests for them."""

from __future__ import annotations

from itertools import pairwise

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer.bench.workloads import WeightSet

__all__ = ["Policy"]

_LAYERS: dict[str, tuple[list[int], type[nn.Module]]] = {
    "tiny": ([4, 2], nn.Identity),
    "mlp": ([64, 256, 256, 8], nn.Tanh),
    "big": ([256, 1024, 1024, 1024, 16], nn.ReLU),
}


class Policy:
    """One of the models ``tiny``, ``mlp`` and ``big``, with what is needed to ask it.

    Args:
        name: the model's name.
        weights: how many parameters it has in all; those that are added take no part in a forward pass.
    """

    def __init__(self, name: str, weights: WeightSet | None = None) -> None:
        widths, activation = _LAYERS[name]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        layers.pop()  # none after the last
        network = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.module = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
        self._inputs, self._outputs = widths[0], widths[-1]
        if weights is not None:
            self.module.ballast = _ballast(self.module, weights)

    def request(self, *rows: int) -> TensorDict:
        """One request with a random observation ``[obs]``, or a ready batch ``[rows, obs]``."""
        return TensorDict({"observation": torch.randn(*rows, self._inputs)}, batch_size=rows)

    def check(self, reply: TensorDict) -> None:
        """Make sure that a reply is one: a system that answers wrongly is not worth measuring."""
        action = reply["action"]
        if action.shape != (self._outputs,):
            raise RuntimeError(f"the action has shape {list(action.shape)}, expected [{self._outputs}]")


def _ballast(module: nn.Module, weights: WeightSet) -> nn.ParameterList:
    """Parameters that make up what ``module`` lacks. Every page of them is written, so that it exists."""
    own = [parameter.numel() for parameter in module.parameters()]
    lacking, tensors = weights.nbytes // 4 - sum(own), weights.tensors - len(own)
    cuts = [lacking * index // tensors for index in range(tensors + 1)]
    return nn.ParameterList(nn.Parameter(torch.ones(end - start)) for start, end in pairwise(cuts))
