"""Who asks: one environment per task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.client import AsyncInferenceClient
from aioinfer.demo.curve import LearningCurve
from aioinfer.demo.rollouts import Fragment, Rollouts

if TYPE_CHECKING:
    import gymnasium

__all__ = ["Player"]

# Short enough that little of a fragment is old news by the time that it is handed over.
_FRAGMENT_STEPS = 64


class Player:
    """One environment, played by one task. Event loop only.

    Args:
        env: the environment; whoever made it closes it.
        seed: of its first episode; those after it go on from there.
        rollouts: gets what happened.
        curve: gets the returns.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int, *, rollouts: Rollouts, curve: LearningCurve) -> None:
        self._env = env
        self._seed = seed
        self._rollouts = rollouts
        self._curve = curve
        self.frames = 0

    async def play(self, client: AsyncInferenceClient) -> None:
        """Play one episode after the other until cancelled; raises what the environment or the client raises."""
        observation, _ = self._env.reset(seed=self._seed)
        while True:
            episode_return, over = 0.0, False
            while not over:
                fragment, over = await self._play_fragment(client, observation)
                self._rollouts.add(fragment)
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
