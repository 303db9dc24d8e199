"""A policy whose random numbers depend on who asks and how often it has asked, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

__all__ = ["TURN_KEY", "LockstepPolicy", "lockstep_weights"]

TURN_KEY = "_aioinfer_turn"
"""The entry of requests that says which group asks, and how often it has asked before: ``[B, 2]``."""

_NAME = "policy"


class LockstepPolicy(nn.Module):
    """Runs a policy on the rows of each request by themselves, with random numbers of their own.

    So what a group of environments gets does not depend on which groups happen to share a batch, nor on their order.

    Args:
        policy: the policy.
        entropy: all random numbers come from it.
    """

    def __init__(self, policy: Callable[..., Any], entropy: int) -> None:
        super().__init__()
        setattr(self, _NAME, policy)
        self._entropy = entropy

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Compute the replies.

        Args:
            batch: ``[B]``, with :data:`TURN_KEY`.
        """
        turns: list[list[int]] = batch.pop(TURN_KEY).tolist()
        parts: list[Any] = []
        start = 0
        with torch.random.fork_rng(devices=[]):
            for end in range(1, len(turns) + 1):
                if end < len(turns) and turns[end] == turns[start]:
                    continue
                group, count = turns[start]
                torch.manual_seed(hash((self._entropy, group, count)) & (2**63 - 1))
                parts.append(getattr(self, _NAME)(batch[start:end]))
                start = end
        joined: Any = torch.cat
        reply: TensorDictBase = parts[0] if len(parts) == 1 else joined(parts)
        return reply


def lockstep_weights(weights: Any) -> Any:
    """The weights of a policy as those of its :class:`LockstepPolicy`."""
    if isinstance(weights, nn.Module):
        return {f"{_NAME}.{name}": value for name, value in weights.state_dict().items()}
    if isinstance(weights, TensorDictBase):
        return TensorDict({_NAME: weights}, batch_size=weights.batch_size)
    if isinstance(weights, Mapping):
        return {f"{_NAME}.{name}": value for name, value in weights.items()}
    return weights
