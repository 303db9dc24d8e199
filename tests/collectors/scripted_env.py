"""A Gymnasium environment whose episodes are written down, and the plain loop that it is compared with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from hypothesis import strategies as st

from tests.limits import HANG


class Episode(NamedTuple):
    length: int
    terminated: bool
    truncated: bool


EPISODES = st.lists(
    st.builds(Episode, st.integers(1, 4), st.booleans(), st.booleans()).filter(
        lambda episode: episode.terminated or episode.truncated
    ),
    min_size=1,
    max_size=4,
)


def fail() -> None:
    raise RuntimeError("the motor is hot")


class Transition(NamedTuple):
    observation: tuple[float, ...]
    is_init: bool
    action: int
    reward: float
    next_observation: tuple[float, ...]
    terminated: bool
    truncated: bool


class Gate:
    """Blocks who enters until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(HANG)


class ScriptedEnv(gymnasium.Env[Any, Any]):
    """Observes a number drawn from its seed, the episode, the step in it, and the last action.

    Args:
        script: its episodes, again from the first one after the last one.
        reuse: whether it returns one buffer again and again.
        at: what it calls at ``("reset", episode)``, ``("step", steps of all episodes before)`` or ``("close", 0)``.
    """

    action_space = spaces.Discrete(5, start=3)

    def __init__(
        self,
        script: Sequence[Episode] = (Episode(3, True, False),),
        *,
        reuse: bool = False,
        at: dict[tuple[str, int], Callable[[], Any]] | None = None,
        dtype: Any = np.float32,
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.script = script
        self.closed = False
        self.seeds: list[int | None] = []
        self._at = at or {}
        self._dtype = dtype
        self._buffer = np.zeros(4, dtype) if reuse else None
        self._episode = -1
        self._step = 0
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self._episode += 1
        self._step = 0
        replaced = self._at.get(("reset", self._episode), lambda: None)()
        return self.observe(0) if replaced is None else replaced, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), repr(action)
        replaced = self._at.get(("step", self._steps), lambda: None)()
        self._step += 1
        self._steps += 1
        episode = self.script[self._episode % len(self.script)]
        ends = self._step == episode.length
        observation = self.observe(action) if replaced is None else replaced
        info = {"twice": 2 * self._step} if self._step % 2 else {}
        return observation, action + self._step / 8, ends and episode.terminated, ends and episode.truncated, info

    def close(self) -> None:
        self.closed = True
        self._at.get(("close", 0), lambda: None)()

    def observe(self, action: int) -> Any:
        values = [self.np_random.integers(1000), self._episode, self._step, action]
        if self._buffer is None:
            return np.array(values, self._dtype)
        self._buffer[:] = values
        return self._buffer


class NestedEnv(ScriptedEnv):
    """Observes the same in a dictionary, beside the number of the step and a text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observation_space = spaces.Dict(
            {
                "values": self.observation_space,
                "more": spaces.Tuple([spaces.Discrete(100), spaces.Text(20, charset="step 0123456789")]),
            }
        )

    def observe(self, action: int) -> Any:
        return {"values": super().observe(action), "more": (self._step, f"step {self._step}")}


def action_of(row: int, step: int) -> int:
    return 3 + (7 * row + step) % 5


def plain_loop(env: Any, seed: int, steps: int, row: int) -> list[Transition]:
    """What a loop by hand sees."""
    seen = []
    observation, is_init = tuple(map(float, env.reset(seed=seed)[0])), True
    for step in range(steps):
        action = action_of(row, step)
        returned, reward, terminated, truncated, _ = env.step(action)
        following = tuple(map(float, returned))
        seen.append(
            Transition(observation, is_init, action, reward, following, terminated, truncated and not terminated)
        )
        observation, is_init = following, terminated or truncated
        if is_init:
            observation = tuple(map(float, env.reset()[0]))
    return seen


class Recorder:
    """Steps a stepper, with actions that depend on row and step alone, and keeps what each row sees.

    Args:
        stepper: of scripted environments.
        leaf: of its observations, the one that has their four values.
    """

    def __init__(self, stepper: Any, leaf: int = 0) -> None:
        self.stepper = stepper
        self._leaf = leaf
        self.seen: list[list[Transition]] = [[] for _ in range(stepper.size)]
        self._asked: dict[int, tuple[tuple[float, ...], bool, int]] = {}

    def step(self, choose: Callable[[Sequence[int]], Sequence[int]] = list) -> None:
        """Step the rows that ``choose`` takes of those that are ready."""
        rows = np.array(choose(self.stepper.ready.tolist()), np.int64)
        self.stepper.step(rows, [self.ask(rows)])
        self.keep()

    def ask(self, rows: Any) -> Any:
        actions = np.array([action_of(row, len(self.seen[row])) for row in rows.tolist()], np.int64)
        for row, action in zip(rows.tolist(), actions.tolist(), strict=True):
            observation = tuple(self.stepper.observations[self._leaf][row].tolist())
            self._asked[row] = observation, bool(self.stepper.is_init[row]), action
        return actions

    def keep(self) -> None:
        stepper = self.stepper
        for row in stepper.stepped.tolist():
            self.seen[row].append(
                Transition(
                    *self._asked.pop(row),
                    float(stepper.reward[row]),
                    tuple(stepper.next_observations[self._leaf][row].tolist()),
                    bool(stepper.terminated[row]),
                    bool(stepper.truncated[row]),
                )
            )


class Abandonable:
    """Calls a method of a stepper in a thread of its own, which may hang."""

    def __init__(self, method: Callable[..., None], *args: Any) -> None:
        self.raised: list[BaseException] = []

        def call() -> None:
            try:
                method(*args)
            except BaseException as error:
                self.raised.append(error)

        self._thread = threading.Thread(target=call)
        self._thread.start()

    def join(self) -> list[type[BaseException]]:
        self._thread.join(HANG)
        assert not self._thread.is_alive()
        return [type(error) for error in self.raised]
