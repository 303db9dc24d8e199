"""Proximal policy optimization (PPO), with generalized advantage estimation (GAE) by a critic."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from aioinfer.demo.policy import Actor, make_network

__all__ = ["LEARNED_FROM", "PPO", "estimate_advantages"]

LEARNED_FROM = (
    "observation",
    "action",
    "log_prob",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "terminated"),
    ("next", "done"),
    ("collector", "mask"),
)
"""The entries of a collector's batch that PPO reads."""

_DISCOUNT = 0.99  # gamma
_TRACE_DECAY = 0.95  # lambda
_CLIP = 0.2  # how far an update moves the probability of an action, as a share of the old one
_EPOCHS = 6  # passes over a batch in one update
_MINIBATCHES = 8  # gradient steps in one pass
_LEARNING_RATE = 1e-3


def estimate_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    *,
    terminated: Tensor,
    done: Tensor,
    mask: Tensor,
    discount: float,
    trace_decay: float,
) -> Tensor:
    """Estimate how much better each action was than the policy on average: GAE (Schulman et al., 2016).

    Args:
        rewards: ``[B, T]``, of ``B`` fragments of one environment each, as are all others.
        values: of the observations before each step.
        next_values: of the observations after each step, before any reset.
        terminated: whether nothing follows, whatever the next value.
        done: whether the next step is of another episode. An episode that was truncated has not terminated: the
            steps that would have followed are worth as much as in one that goes on.
        mask: false behind the end of a fragment.
        discount: gamma.
        trace_decay: lambda; 0 relies on the values, 1 on the rewards.

    Returns:
        ``[B, T]``, memory of its own; 0 behind the end of a fragment.
    """
    errors = (rewards + discount * next_values * ~terminated - values) * mask
    decay = discount * trace_decay * ~done
    advantages, advantage = torch.zeros_like(errors), torch.zeros(len(errors))
    for step in reversed(range(errors.shape[1])):
        advantage = errors[:, step] + decay[:, step] * advantage
        advantages[:, step] = advantage
    return advantages


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

    def update(self, batch: TensorDictBase) -> None:
        """Learn from one batch ``[B, T]`` of at least two steps, with the entries of ``LEARNED_FROM``."""
        advantages, returns = self._targets(batch)
        columns = (batch["observation"], batch["action"], batch["log_prob"], advantages, returns)
        observations, actions, log_probs, advantages, returns = (
            column[batch["collector", "mask"]] for column in columns
        )
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(actions)).chunk(_MINIBATCHES):
                actor_loss = self._actor_loss(observations[rows], actions[rows], log_probs[rows], advantages[rows])
                critic_loss = (self._critic(observations[rows]).squeeze(-1) - returns[rows]).square().mean()
                self._optimizer.zero_grad()
                (actor_loss + critic_loss).backward()
                nn.utils.clip_grad_norm_(self._parameters, 0.5)
                self._optimizer.step()

    @torch.no_grad()
    def _targets(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """For each step of the batch: its advantage, and the return, which the critic should predict; ``[B, T]``."""
        following = batch["next"]
        values = self._critic(batch["observation"]).squeeze(-1)
        advantages = estimate_advantages(
            # In units of the largest possible return the values are about 1, whatever the discount.
            following["reward"].squeeze(-1) * (1.0 - _DISCOUNT),
            values,
            self._critic(following["observation"]).squeeze(-1),
            terminated=following["terminated"].squeeze(-1),
            done=following["done"].squeeze(-1),
            mask=batch["collector", "mask"],
            discount=_DISCOUNT,
            trace_decay=_TRACE_DECAY,
        )
        return advantages, advantages + values

    def _actor_loss(self, observations: Tensor, actions: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        new = self._actor.log_probs(observations).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        ratio = (new - log_probs).exp()
        clipped = ratio.clamp(1.0 - _CLIP, 1.0 + _CLIP)
        return -torch.min(ratio * advantages, clipped * advantages).mean()
