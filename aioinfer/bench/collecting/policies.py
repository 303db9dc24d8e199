"""The policies by which environments act: one network and its sampling, the same for every system."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer.bench.collecting.environments import PONG

_PONG_ACTIONS = 6


class SamplingPolicy(nn.Module):
    """Samples an action for each row of observations, and returns it with its log-probability.

    Args:
        network: of observations to the logits of the actions.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """The actions ``[B]``, int64, and their log-probabilities ``[B]``."""
        log_probs = torch.log_softmax(self.network(observation), -1)
        action = torch.multinomial(log_probs.exp(), 1)
        return action.squeeze(-1), log_probs.gather(-1, action).squeeze(-1)


def make_bare_policy(environment: str) -> SamplingPolicy:
    """The policy for these environments: an MLP with two layers of 64, or a CNN for Pong."""
    return SamplingPolicy(_convolutions() if environment == "Pong" else _dense())


def make_policy(environment: str) -> TensorDictModule:
    """The same policy as a collector gets it."""
    return TensorDictModule(make_bare_policy(environment), ["observation"], ["action", "action_log_prob"])


def make_cartpole_policy() -> TensorDictModule:
    """The policy in a process that torchrl starts."""
    torch.set_num_threads(1)
    return make_policy("CartPole")


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def _convolutions() -> nn.Module:
    height, width = ((((side // 2 - 8) // 4 + 1) - 4) // 2 + 1 for side in PONG)
    return nn.Sequential(
        _EverySecondPixel(),
        nn.Conv2d(1, 16, 8, 4),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * height * width, _PONG_ACTIONS),
    )


class _EverySecondPixel(nn.Module):
    """Brightness from 0 to 1, in one channel."""

    def forward(self, image: Tensor) -> Tensor:
        return image[:, None, ::2, ::2].float().div_(255)
