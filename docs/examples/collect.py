"""Batches of experience from 16 CartPole environments in two workers, to a policy that learns in between."""

from typing import Any

import gymnasium
import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical

from aioinfer.collectors import AsyncBatchedCollector


def make_env() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1")


def make_policy() -> ProbabilisticTensorDictSequential:
    """From observations to logits, and to actions that are drawn from them."""
    network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    return ProbabilisticTensorDictSequential(
        TensorDictModule(network, in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(in_keys=["logits"], out_keys=["action"], distribution_class=Categorical),
    )


def lean(observation: Tensor) -> Tensor:
    """How far the pole leans, and will in a moment."""
    return (observation[:, 2] + 0.5 * observation[:, 3]).abs()


def train(policy: Any, optimizer: torch.optim.Optimizer, batch: TensorDictBase) -> None:
    """Make actions more likely after which the pole leans less. It stands for an algorithm that thinks ahead."""
    steps = batch[batch["collector", "mask"]]  # [B, T] -> [N], without what is behind a cut
    gain = lean(steps["observation"]) - lean(steps["next", "observation"])
    loss = -(policy.get_dist(steps).log_prob(steps["action"]) * gain).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    torch.set_num_threads(1)  # a small policy is faster on one core
    policy = make_policy()
    optimizer = torch.optim.Adam(policy.parameters(), 0.02)
    with AsyncBatchedCollector(
        make_env, policy=policy, num_envs=16, num_workers=2, frames_per_batch=1024, total_frames=20_000, seed=0
    ) as collector:
        for batch in collector:
            train(policy, optimizer, batch)
            collector.update_policy_weights_()  # in use from the next forward pass on
            print(f"return {collector.stats().episode_return or 0:.0f}, version {collector.policy_version}")
        stats = collector.stats()
    print(f"{stats.frames} frames at {stats.frames_per_second:.0f}/s, limited by the {stats.limited_by}")


if __name__ == "__main__":
    main()
