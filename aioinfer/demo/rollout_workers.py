"""Rollouts: one task for each environment collects fragments of episodes, and a buffer holds them for the trainer.

All of it belongs to the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase

from aioinfer.client import AsyncInferenceClient
from aioinfer.demo.learning_curve import LearningCurve

if TYPE_CHECKING:
    import gymnasium

# Short, so that the first steps of a fragment are still recent when the trainer gets it.
_FRAGMENT_STEPS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """Consecutive steps of one episode: all of it, or a part that the next fragment continues.

    Attributes:
        observations: ``[T + 1, 4]``: before each step, and after the last.
        actions: ``[T]``.
        log_probs: ``[T]``: of the actions, under the policy that chose them.
        rewards: ``[T]``.
        terminated: whether the last step ended the episode. Not so at the time limit: the steps that would
            have followed are worth as much as in an episode that goes on.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: bool

    def __len__(self) -> int:
        return len(self.actions)


class RolloutBuffer:
    """A bounded buffer of the fragments that the trainer has not seen. Event loop only.

    Workers never wait for the trainer. If it is behind, the oldest fragments are dropped: the oldest policies
    collected them.

    Args:
        steps: the least size of a batch; fragments that are older than it needs are dropped.
    """

    def __init__(self, steps: int = 2048) -> None:
        self._wanted = steps
        self._held = 0
        self._fragments: deque[Fragment] = deque()
        self._enough = asyncio.Event()

    def add(self, fragment: Fragment) -> None:
        """Add a fragment, and drop the oldest ones that a batch can do without."""
        self._fragments.append(fragment)
        self._held += len(fragment)
        while self._held - len(self._fragments[0]) >= self._wanted:
            self._held -= len(self._fragments.popleft())
        if self._held >= self._wanted:
            self._enough.set()

    async def take(self) -> list[Fragment]:
        """Wait until there is a batch, and take it; takes nothing if it is cancelled."""
        await self._enough.wait()
        batch = list(self._fragments)
        self._fragments.clear()
        self._held = 0
        self._enough.clear()
        return batch


class RolloutWorker:
    """One task that plays one environment. Event loop only.

    Args:
        env: the environment; its maker closes it.
        seed: of the first episode; the later episodes continue its random numbers.
        buffer: gets the fragments of episodes.
        curve: gets the returns and the policy versions.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int, *, buffer: RolloutBuffer, curve: LearningCurve) -> None:
        self._env = env
        self._seed = seed
        self._buffer = buffer
        self._curve = curve
        self.frames = 0

    async def run(self, client: AsyncInferenceClient) -> None:
        """Play one episode after the other until cancelled; raises the errors of the environment and of the client."""
        observation, _ = self._env.reset(seed=self._seed)
        while True:
            episode_return, over = 0.0, False
            while not over:
                fragment, over = await self._play_fragment(client, observation)
                self._buffer.add(fragment)
                episode_return += float(fragment.rewards.sum())
                observation = fragment.observations[-1]
            self._curve.add_episode(episode_return)
            observation, _ = self._env.reset()

    async def _play_fragment(self, client: AsyncInferenceClient, observation: Any) -> tuple[Fragment, bool]:
        observations = [observation]
        actions: list[int] = []
        log_probs: list[float] = []
        rewards: list[float] = []
        terminated = truncated = False
        while not (terminated or truncated) and len(actions) < _FRAGMENT_STEPS:
            reply = await client(_request(observation))
            action = int(reply["action"])
            observation, reward, terminated, truncated, _ = self._env.step(action)
            self.frames += 1
            observations.append(observation)
            actions.append(action)
            log_probs.append(float(reply["log_prob"]))
            rewards.append(float(reward))
        self._curve.see_version(int(reply["policy_version"]))
        fragment = Fragment(
            np.stack(observations),
            np.array(actions),
            np.array(log_probs, np.float32),
            np.array(rewards, np.float32),
            terminated,
        )
        return fragment, terminated or truncated


def _request(observation: Any) -> TensorDictBase:
    # CartPole makes a new array at each step, so the request may share its memory.
    return TensorDict({"observation": torch.from_numpy(observation)})
