"""The models that are served, and requests for them."""

from __future__ import annotations

from itertools import pairwise

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

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
    """

    def __init__(self, name: str) -> None:
        widths, activation = _LAYERS[name]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        layers.pop()  # none after the last
        network = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.module = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
        self._inputs, self._outputs = widths[0], widths[-1]

    def request(self, *rows: int) -> TensorDict:
        """One request with a random observation ``[obs]``, or a ready batch ``[rows, obs]``."""
        return TensorDict({"observation": torch.randn(*rows, self._inputs)}, batch_size=rows)

    def check(self, reply: TensorDict) -> None:
        """Make sure that a reply is one: a system that answers wrongly is not worth measuring."""
        action = reply["action"]
        if action.shape != (self._outputs,):
            raise RuntimeError(f"the action has shape {list(action.shape)}, expected [{self._outputs}]")
