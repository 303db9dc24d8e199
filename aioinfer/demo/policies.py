"""What is served: categorical policies for CartPole, in three sizes."""

from __future__ import annotations

from itertools import pairwise

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

__all__ = ["HIDDEN", "make_policy"]

HIDDEN: dict[str, tuple[int, ...]] = {"tiny": (16,), "mlp": (64, 64), "big": (1024, 1024)}
"""The hidden layers of each model."""

_OBSERVATION_SIZE, _ACTION_COUNT = 4, 2


class _Categorical(nn.Module):
    """Logits, and one action sampled from them: ``[B, 4]`` to ``[B]``."""

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size, next_size in pairwise((_OBSERVATION_SIZE, *hidden)):
            layers += [nn.Linear(size, next_size), nn.Tanh()]
        self.logits = nn.Sequential(*layers, nn.Linear(hidden[-1], _ACTION_COUNT))

    def forward(self, observation: Tensor) -> Tensor:
        probabilities = self.logits(observation).softmax(-1)
        # Sampling in the model draws for the whole batch at once, and only the action travels back.
        return torch.multinomial(probabilities, 1).squeeze(-1)


def make_policy(name: str) -> TensorDictModule:
    """Make an untrained policy from ``observation`` ``[B, 4]`` to ``action`` ``[B]``; ``name`` is a key of HIDDEN."""
    return TensorDictModule(_Categorical(HIDDEN[name]), in_keys=["observation"], out_keys=["action"])
