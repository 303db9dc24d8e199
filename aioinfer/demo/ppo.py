"""Proximal policy optimization (PPO), with generalized advantage estimation (GAE) by a critic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from aioinfer.demo.policy import Actor, make_network
from aioinfer.demo.rollout_workers import Fragment

_DISCOUNT = 0.99  # gamma
_TRACE_DECAY = 0.95  # lambda
_CLIP = 0.2  # how far an update moves the probability of an action, as a share of the old one
_EPOCHS = 6  # passes over a batch in one update
_MINIBATCHES = 8  # gradient steps in one pass
_LEARNING_RATE = 1e-3


def estimate_advantages(
    rewards: Tensor, values: Tensor, *, terminated: bool, discount: float, trace_decay: float
) -> Tensor:
    """Estimate how much better each action was than the policy on average: GAE (Schulman et al., 2016).

    Args:
        rewards: ``[T]``.
        values: ``[T + 1]``, of the observations before each step and after the last.
        terminated: whether nothing follows, whatever the last value.
        discount: gamma.
        trace_decay: lambda; 0 relies on the values, 1 on the rewards.

    Returns:
        ``[T]``, memory of its own.
    """
    following = values[1:].clone()
    if terminated:
        following[-1] = 0.0
    errors = rewards + discount * following - values[:-1]
    advantage, backwards = 0.0, []
    for error in reversed(errors.tolist()):
        advantage = error + discount * trace_decay * advantage
        backwards.append(advantage)
    return torch.tensor(backwards[::-1])


class PPO:
    """Improves an actor in place (Schulman et al., 2017).

    The batches may come from somewhat older versions of the actor: each step is weighed by the probability that
    its action had then.

    The critic and the optimizer belong to one thread, as the actor does.
    """

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._critic = make_network(1)
        self._parameters = [*actor.parameters(), *self._critic.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, _LEARNING_RATE)

    def update(self, batch: Sequence[Fragment]) -> None:
        """Learn from one batch of at least two steps."""
        observations = torch.from_numpy(np.concatenate([fragment.observations[:-1] for fragment in batch]))
        actions = torch.from_numpy(np.concatenate([fragment.actions for fragment in batch])).unsqueeze(-1)
        log_probs = torch.from_numpy(np.concatenate([fragment.log_probs for fragment in batch]))
        advantages, returns = self._targets(batch)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(actions)).chunk(_MINIBATCHES):
                actor_loss = self._actor_loss(observations[rows], actions[rows], log_probs[rows], advantages[rows])
                critic_loss = (self._critic(observations[rows]).squeeze(-1) - returns[rows]).square().mean()
                self._optimizer.zero_grad()
                (actor_loss + critic_loss).backward()
                nn.utils.clip_grad_norm_(self._parameters, 0.5)
                self._optimizer.step()

    @torch.no_grad()
    def _targets(self, batch: Sequence[Fragment]) -> tuple[Tensor, Tensor]:
        """For each step of the batch: its advantage, normalized, and the return, which the critic should predict."""
        advantages, returns = [], []
        for fragment in batch:
            values = self._critic(torch.from_numpy(fragment.observations)).squeeze(-1)
            advantage = estimate_advantages(
                # In units of the largest possible return the values are about 1, whatever the discount.
                torch.from_numpy(fragment.rewards) * (1.0 - _DISCOUNT),
                values,
                terminated=fragment.terminated,
                discount=_DISCOUNT,
                trace_decay=_TRACE_DECAY,
            )
            advantages.append(advantage)
            returns.append(advantage + values[:-1])
        found = torch.cat(advantages)
        return (found - found.mean()) / (found.std() + 1e-8), torch.cat(returns)

    def _actor_loss(self, observations: Tensor, actions: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        ratio = (self._actor.log_probs(observations).gather(-1, actions).squeeze(-1) - log_probs).exp()
        clipped = ratio.clamp(1.0 - _CLIP, 1.0 + _CLIP)
        return -torch.min(ratio * advantages, clipped * advantages).mean()
