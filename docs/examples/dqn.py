"""DQN learns CartPole from a replay buffer, which a collector fills while the epsilon of its policy falls."""

import argparse
import copy

import gymnasium
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer.collectors import AsyncBatchedCollector

ENVS, STEPS = 8, 32  # a batch is [8, 32]
FRAMES = 100_000
RANDOM_FRAMES = 2_000
EPSILON, EXPLORING = 0.02, 0.2  # epsilon falls from 1 to this within this part of the frames
CAPACITY = 100_000
UPDATES, MINIBATCH = 32, 128  # for each batch
DISCOUNT = 0.99
LEARNING_RATE = 1e-3
TARGET_RATE = 0.3  # how much of the new weights the target takes over after each batch


class EpsilonGreedy(nn.Module):
    """The action of the highest value, or with the probability epsilon any: ``[B, 4]`` to ``[B]``."""

    epsilon: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
        self.register_buffer("epsilon", torch.tensor(1.0))  # a buffer, so it is published with the weights

    def forward(self, observation: Tensor) -> Tensor:
        values = self.values(observation)
        explores = torch.rand(values.shape[:-1]) < self.epsilon
        return torch.where(explores, torch.randint(2, values.shape[:-1]), values.argmax(-1))


class ReplayBuffer:
    """Keeps the latest steps, in a ring. That of torchrl fits in its place."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.added = 0

    def extend(self, steps: TensorDictBase) -> None:
        """Copy steps ``[N]``."""
        if not self.added:
            self.ring = steps[:1].expand(self.capacity).clone()
        self.ring[torch.arange(self.added, self.added + len(steps)) % self.capacity] = steps
        self.added += len(steps)

    def sample(self, size: int) -> TensorDictBase:
        return self.ring[torch.randint(min(self.added, self.capacity), (size,))]


def look_ahead(batch: TensorDictBase) -> TensorDictBase:
    """Give each step of ``[B, T]`` the rewards until its episode or its fragment ends, and the observation there.

    The steps of a fragment follow one another. A value learns faster from up to 32 rewards than from one.
    """
    following, mask = batch["next"], batch["collector", "mask"]  # the mask is false behind the end of a cut fragment
    reward, observation = following["reward"].clone(), following["observation"].clone()
    discount = DISCOUNT * ~following["terminated"]  # truncation is no reason why nothing would follow
    goes_on = mask[:, 1:, None] & ~following["done"][:, :-1]
    for step in reversed(range(goes_on.shape[1])):
        more, now, then = goes_on[:, step], (slice(None), step), (slice(None), step + 1)
        reward[now] += DISCOUNT * more * reward[then]
        discount[now] = torch.where(more, DISCOUNT * discount[then], discount[now])
        observation[now] = torch.where(more, observation[then], observation[now])
    steps = {"observation": batch["observation"], "action": batch["action"], "collector": {"mask": mask}}
    ahead = {"reward": reward, "discount": discount, "next_observation": observation}
    return TensorDict({**steps, **ahead}, batch_size=batch.batch_size)


class Learner:
    """Double DQN: the network chooses the next action, and its older copy says what that is worth."""

    def __init__(self, values: nn.Module, batches: int) -> None:
        self.values, self.target = values, copy.deepcopy(values)
        self.loss = nn.SmoothL1Loss()
        self.optimizer = torch.optim.Adam(values.parameters(), LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.01, batches)

    def learn(self, buffer: ReplayBuffer) -> None:
        for _ in range(UPDATES):
            self.update(buffer.sample(MINIBATCH))
        for older, newer in zip(self.target.parameters(), self.values.parameters(), strict=True):
            older.data.lerp_(newer.data, TARGET_RATE)
        self.schedule.step()

    def update(self, steps: TensorDictBase) -> None:
        with torch.no_grad():
            best = self.values(steps["next_observation"]).argmax(-1, keepdim=True)
            next_value = self.target(steps["next_observation"]).gather(-1, best)
        value = self.values(steps["observation"]).gather(-1, steps["action"].unsqueeze(-1))
        loss = self.loss(value, steps["reward"] + steps["discount"] * next_value)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.values.parameters(), 10.0)
        self.optimizer.step()


def learn(seed: int = 0, frames: int = FRAMES) -> list[tuple[int, float]]:
    """Learn, and return how many frames there were after each batch, and the mean return of 100 episodes then."""
    torch.set_num_threads(1)  # small layers gain nothing from more
    torch.manual_seed(seed)
    network, buffer, curve = EpsilonGreedy(), ReplayBuffer(CAPACITY), []
    learner = Learner(network.values, frames // (ENVS * STEPS))
    with AsyncBatchedCollector(
        lambda: gymnasium.make("CartPole-v1"),
        policy=TensorDictModule(network, in_keys=["observation"], out_keys=["action"]),
        num_envs=ENVS,
        frames_per_batch=ENVS * STEPS,
        fragment_length=STEPS,
        total_frames=frames,
        init_random_frames=RANDOM_FRAMES,
        seed=seed,
        postproc=look_ahead,
        replay_buffer=buffer,
    ) as collector:
        for _ in collector:  # the batches are in the buffer
            learner.learn(buffer)
            stats = collector.stats()
            network.epsilon.fill_(max(EPSILON, 1.0 - stats.frames / (EXPLORING * frames)))
            collector.update_policy_weights_()  # those that the policy has now
            curve.append((stats.frames, stats.episode_return or 0.0))
            if stats.batches % 50 == 0:
                print(f"{stats.frames:7} frames: the mean return is {curve[-1][1]:.1f}", flush=True)
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=FRAMES)
    options = parser.parse_args()
    (*_, (total, average)) = learn(options.seed, options.frames)
    print(f"after {total} frames 100 episodes return {average:.1f} on average")
