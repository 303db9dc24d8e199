"""PPO: a trainer in a process of its own learns from the batches of a collector, and publishes weights to it.

Run it with the name of an environment: CartPole-v1, Acrobot-v1 or Pendulum-v1.
"""

import argparse
import contextlib
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.weight_sync import MultiProcessWeightSyncScheme

FRAGMENTS, STEPS = 32, 64  # of a batch: [32, 64]
CLIP = 0.2  # how far an update moves the probability of an action, as a share of the old one
TRACE_DECAY = 0.95  # lambda of GAE
MINIBATCHES = 8


@dataclass(frozen=True)
class Task:
    """An environment, and what suits it."""

    frames: int  # the budget
    discount: float  # gamma
    reward_scale: float  # so that values are about 1
    learning_rate: float
    epochs: int = 6  # passes over a batch


TASKS = {
    "CartPole-v1": Task(frames=200_000, discount=0.99, reward_scale=0.01, learning_rate=1e-3),
    "Acrobot-v1": Task(frames=250_000, discount=0.99, reward_scale=0.01, learning_rate=1e-3),
    "Pendulum-v1": Task(frames=300_000, discount=0.9, reward_scale=0.03, learning_rate=5e-4, epochs=10),
}


def make_network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


class Actor(nn.Module):
    """Samples actions, and tells the logarithm of the probability of each."""

    def __init__(self, name: str) -> None:
        super().__init__()
        env: Any = gymnasium.make(name)
        space, self.inputs = env.action_space, env.observation_space.shape[0]
        self.discrete = isinstance(space, gymnasium.spaces.Discrete)
        outputs = int(space.n) if self.discrete else space.shape[0]
        self.network = make_network(self.inputs, outputs)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(outputs))

    def distribution(self, observation: Tensor) -> Distribution:
        output = self.network(observation)
        if self.discrete:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.distribution(observation)
        action = distribution.sample()
        return action, distribution.log_prob(action)


def make_policy(actor: Actor) -> TensorDictModule:
    """The collector and the trainer make one each, so that the weights of one fit the other."""
    return TensorDictModule(actor, in_keys=["observation"], out_keys=["action", "log_prob"])


def estimate_advantages(batch: TensorDictBase, value: Tensor, next_value: Tensor, discount: float) -> Tensor:
    """GAE along the fragments: all of these are ``[B, T]``.

    An episode that was truncated, and the end of a fragment, count on with the value of the observation that followed:
    only what terminated an episode makes it worthless.
    """
    following, mask = batch["next"], batch["collector", "mask"]
    reward, terminated, done = (following[key].squeeze(-1) for key in ("reward", "terminated", "done"))
    error = (reward + discount * next_value * ~terminated - value) * mask
    advantage, decay = torch.zeros_like(error), discount * TRACE_DECAY * ~done
    latest = torch.zeros(len(error))
    for step in reversed(range(error.shape[1])):
        latest = error[:, step] + decay[:, step] * latest
        advantage[:, step] = latest
    return advantage


class Learner:
    """PPO with a critic, for which the optimizer and its schedule are made for so many batches."""

    def __init__(self, actor: Actor, task: Task, batches: int) -> None:
        self.actor, self.critic, self.task = actor, make_network(actor.inputs, 1), task
        self.parameters = [*actor.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, task.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.01, batches)

    def learn(self, batch: TensorDictBase) -> None:
        """Learn from a batch ``[B, T]``."""
        batch["next", "reward"] *= self.task.reward_scale
        with torch.no_grad():
            value, next_value = (self.critic(td["observation"]).squeeze(-1) for td in (batch, batch["next"]))
        advantage = estimate_advantages(batch, value, next_value, self.task.discount)
        columns = (batch["observation"], batch["action"], batch["log_prob"], advantage, advantage + value)
        steps = [column[batch["collector", "mask"]] for column in columns]  # [N, ...]: without what is behind a cut
        for _ in range(self.task.epochs):
            for rows in torch.randperm(len(steps[0])).chunk(MINIBATCHES):
                self.update(*[column[rows] for column in steps])
        self.schedule.step()

    def update(self, observation: Tensor, action: Tensor, log_prob: Tensor, advantage: Tensor, target: Tensor) -> None:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        ratio = (self.actor.distribution(observation).log_prob(action) - log_prob).exp()
        actor_loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        critic_loss = (self.critic(observation).squeeze(-1) - target).square().mean()
        self.optimizer.zero_grad()
        (actor_loss + critic_loss).backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()


def train(name: str, seed: int, frames: int, scheme: MultiProcessWeightSyncScheme, batches: Connection) -> None:
    """What runs in the trainer's process: learn from one batch after the other, until there are no more."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    actor = Actor(name)
    learner = Learner(actor, TASKS[name], frames // (FRAGMENTS * STEPS))
    scheme.init_on_sender(model=make_policy(actor))
    scheme.connect(timeout=60.0)  # publishes the first weights, and waits until the collector uses them
    with batches, contextlib.suppress(EOFError):
        while True:
            learner.learn(TensorDict.from_dict(batches.recv(), batch_dims=2))
            scheme.send()
    scheme.shutdown()


def learn(name: str, seed: int = 0, frames: int | None = None) -> list[tuple[int, float]]:
    """Learn, and return how many frames there were after each batch, and the mean return of 100 episodes then."""
    torch.set_num_threads(1)  # small layers gain nothing from more
    torch.manual_seed(seed)
    frames = frames or TASKS[name].frames
    scheme = MultiProcessWeightSyncScheme(sync=False, num_workers=1)  # makes the queue, ahead of the process
    context = multiprocessing.get_context("spawn")
    received, batches = context.Pipe(duplex=False)
    trainer = context.Process(target=train, args=(name, seed, frames, scheme, received), daemon=True)
    trainer.start()
    received.close()  # the trainer alone has that end, so that its death is noticed here
    curve = []
    with (
        batches,
        AsyncBatchedCollector(
            lambda: gymnasium.make(name),
            policy=make_policy(Actor(name)),
            num_envs=FRAGMENTS,
            frames_per_batch=FRAGMENTS * STEPS,
            fragment_length=STEPS,
            total_frames=frames,
            max_batches_ahead=1,  # so that the trainer gets what a recent policy has collected
            seed=seed,
            weight_sync=scheme,
        ) as collector,
    ):
        for batch in collector:
            batches.send(batch.numpy())  # blocks while the trainer is busy
            stats = collector.stats()
            curve.append((stats.frames, stats.episode_return or 0.0))
            if stats.batches % 10 == 0:
                print(f"{stats.frames:7} frames: the mean return is {curve[-1][1]:.1f}", flush=True)
    trainer.join()  # it ends where there are no more batches
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="CartPole-v1", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int)
    options = parser.parse_args()
    (*_, (total, average)) = learn(options.name, options.seed, options.frames)
    print(f"after {total} frames 100 episodes return {average:.1f} on average")
