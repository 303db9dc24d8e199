"""Who asks: one environment per worker, in a coroutine or in a thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient

if TYPE_CHECKING:
    import gymnasium

__all__ = ["Player", "play_in_task", "play_in_thread"]


class Player:
    """One environment, played by one worker, and what came of it.

    Only that worker writes here. The counters are plain numbers, so the view reads them without a lock.

    Args:
        env: the environment; whoever made it closes it.
        seed: of its first episode; those after it go on from there.
    """

    __slots__ = ("_env", "_return", "_seed", "episodes", "frames", "returns")

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        self._env = env
        self._seed = seed
        self._return = 0.0
        self.frames = 0
        self.episodes = 0
        self.returns = 0.0
        """Sum of the returns of the finished episodes."""

    def start(self) -> TensorDict:
        """Begin the first episode; return the first request."""
        observation, _ = self._env.reset(seed=self._seed)
        return _request(observation)

    def step(self, reply: TensorDictBase) -> TensorDict:
        """Do what the reply says; return the next request."""
        observation, reward, terminated, truncated, _ = self._env.step(int(reply["action"]))
        self.frames += 1
        self._return += float(reward)
        if terminated or truncated:
            self.episodes += 1
            self.returns += self._return
            self._return = 0.0
            observation, _ = self._env.reset()
        return _request(observation)


def _request(observation: Any) -> TensorDict:
    # CartPole makes a new array at each step, so the request may share its memory.
    return TensorDict({"observation": torch.from_numpy(observation)})


async def play_in_task(player: Player, client: AsyncInferenceClient, *, halt: threading.Event) -> None:
    """Play until ``halt`` is set; a server that closes ends it with :class:`~aioinfer.ServerClosedError`."""
    request = player.start()
    while not halt.is_set():
        request = player.step(await client(request))


def play_in_thread(player: Player, client: InferenceClient, *, halt: threading.Event) -> None:
    """Do as :func:`play_in_task`, in a thread that blocks for each reply."""
    request = player.start()
    while not halt.is_set():
        request = player.step(client(request))
