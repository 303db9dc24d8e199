"""The policy: a categorical one for CartPole, small enough to learn in a minute."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

_OBSERVATION_SIZE, _HIDDEN_SIZE, _ACTION_COUNT = 4, 64, 2


def make_network(outputs: int) -> nn.Sequential:
    """Make a network from observations ``[B, 4]`` to ``[B, outputs]``."""
    return nn.Sequential(
        nn.Linear(_OBSERVATION_SIZE, _HIDDEN_SIZE),
        nn.Tanh(),
        nn.Linear(_HIDDEN_SIZE, _HIDDEN_SIZE),
        nn.Tanh(),
        nn.Linear(_HIDDEN_SIZE, outputs),
    )


class Actor(nn.Module):
    """Samples actions, and returns the logarithm of the probability of each."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = make_network(_ACTION_COUNT)

    def log_probs(self, observation: Tensor) -> Tensor:
        """Logarithms of the probabilities of both actions: ``[B, 4]`` to ``[B, 2]``."""
        logits: Tensor = self.logits(observation)
        return logits.log_softmax(-1)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Sample: ``[B, 4]`` to actions ``[B]`` and the logarithms of their probabilities ``[B]``."""
        log_probs = self.log_probs(observation)
        # Sampling in the model draws for the whole batch at once, and only two numbers travel back.
        action = torch.multinomial(log_probs.exp(), 1)
        return action.squeeze(-1), log_probs.gather(-1, action).squeeze(-1)


def make_policy(actor: Actor | None = None) -> TensorDictModule:
    """Make a policy from ``observation`` ``[B, 4]`` to ``action`` ``[B]`` and ``log_prob`` ``[B]``.

    The server and the trainer each make one, so that the weights of one fit the other.

    Args:
        actor: of which it is made; ``None``: a new one.
    """
    return TensorDictModule(actor or Actor(), in_keys=["observation"], out_keys=["action", "log_prob"])
