from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from aioinfer.collectors.environments import Abandoned, make_stepper
from aioinfer.collectors.watch import Phase, Watch
from tests.collectors.scripted_env import (
    EPISODES,
    Abandonable,
    Episode,
    Gate,
    Recorder,
    Transition,
    action_of,
    fail,
)
from tests.limits import HANG

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (4,), np.float32)
ACTIONS = spaces.Discrete(5, start=3)


class ScriptedTeam:
    """A parallel environment of PettingZoo's, whose agents come and go as it is written down.

    Args:
        scripts: of each agent, how long it lives in each episode of all of them.
        late: how many steps later than the others each agent comes.
        at: as of a scripted environment.
    """

    metadata: dict[str, Any] = {"name": "team"}  # noqa: RUF012
    render_mode = None

    def __init__(
        self,
        scripts: Sequence[Sequence[Episode]],
        late: Sequence[int] | None = None,
        at: dict[tuple[str, int], Callable[[], None]] | None = None,
    ) -> None:
        self.possible_agents = [f"agent {index}" for index in range(len(scripts))]
        self.agents: list[str] = []
        self.closed = False
        self.seeds: list[int | None] = []
        self._scripts = scripts
        self._late = late or [0] * len(scripts)
        self._at = at or {}
        self._episode = -1
        self._step = 0
        self._steps = 0

    @property
    def unwrapped(self) -> Any:
        return self

    def observation_space(self, agent: str) -> Any:
        return OBSERVATIONS

    def action_space(self, agent: str) -> Any:
        return ACTIONS

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.seeds.append(seed)
        self._episode += 1
        self._step = 0
        self._at.get(("reset", self._episode), lambda: None)()
        self.agents = [agent for index, agent in enumerate(self.possible_agents) if not self._late[index]]
        return {agent: self._observe(agent, 0) for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> Any:
        assert list(actions) == self.agents
        assert all(self.action_space(agent).contains(action) for agent, action in actions.items())
        self._at.get(("step", self._steps), lambda: None)()
        self._step += 1
        self._steps += 1
        ends = {agent: self._lives(agent).length == self._step - self._late_of(agent) for agent in actions}
        terminated = {agent: ends[agent] and self._lives(agent).terminated for agent in actions}
        truncated = {agent: ends[agent] and self._lives(agent).truncated for agent in actions}
        came = [agent for agent in self.possible_agents if self._late_of(agent) == self._step and not ends.get(agent)]
        self.agents = [
            agent for agent in self.possible_agents if (agent in actions and not ends[agent]) or agent in came
        ]
        told = [*actions, *came]
        observations = {agent: self._observe(agent, actions.get(agent, 0)) for agent in told}
        rewards = {agent: actions[agent] + self._step / 8 if agent in actions else 0.0 for agent in told}
        terminated, truncated = dict.fromkeys(came, False) | terminated, dict.fromkeys(came, False) | truncated
        return observations, rewards, terminated, truncated, {agent: {"step": self._step} for agent in told}

    def close(self) -> None:
        self.closed = True

    def _late_of(self, agent: str) -> int:
        return self._late[self.possible_agents.index(agent)]

    def _lives(self, agent: str) -> Episode:
        script = self._scripts[self.possible_agents.index(agent)]
        return script[self._episode % len(script)]

    def _observe(self, agent: str, action: int) -> Any:
        return np.array([self.possible_agents.index(agent), self._episode, self._step, action], np.float32)


def plain_loop(env: ScriptedTeam, seed: int, steps: int) -> list[list[Transition]]:
    """What a loop by hand sees, for each agent, with actions that depend on the agent's own steps."""
    seen: dict[str, list[Transition]] = {agent: [] for agent in env.possible_agents}
    before = env.reset(seed)[0]
    fresh = set(before)
    for _ in range(steps):
        actions = {agent: action_of(int(agent[6:]), len(seen[agent])) for agent in env.agents}
        observations, rewards, terminated, truncated, _ = env.step(actions)
        for agent, action in actions.items():
            seen[agent].append(
                Transition(
                    tuple(before[agent].tolist()),
                    agent in fresh,
                    action,
                    rewards[agent],
                    tuple(observations[agent].tolist()),
                    terminated[agent],
                    truncated[agent] and not terminated[agent],
                )
            )
        fresh = set(observations) - set(actions)
        before = observations
        if not env.agents:
            before = env.reset()[0]
            fresh = set(before)
    return list(seen.values())


@settings(max_examples=60)
@given(
    scripts=st.lists(EPISODES, min_size=1, max_size=4),
    late=st.lists(st.integers(1, 2), max_size=3),
    data=st.data(),
)
def test_agents_see_what_a_plain_loop_sees(scripts: list[list[Episode]], late: list[int], data: st.DataObject) -> None:
    # An agent that comes later, and one that stays until it has come.
    coming = [*[0] * len(scripts), *late]
    scripts = [[Episode(4, True, False)], *scripts[1:], *[[Episode(2, False, True)]] * len(late)]
    stepper = make_stepper([ScriptedTeam(scripts, coming)], Watch(), ())
    assert stepper.min_rows == stepper.size == len(scripts)
    assert stepper.is_uneven
    stepper.reset(range(stepper.size))
    recorder = Recorder(stepper)
    steps = data.draw(st.integers(1, 12))
    for _ in range(steps):
        if len(stepper.ready) > 1 and data.draw(st.booleans()):
            recorder.step(lambda ready: ready[::2])
            assert stepper.stepped.tolist() == []
        recorder.step()
        assert not stepper.failures
        assert len(stepper.ready) > 0
    assert recorder.seen == plain_loop(ScriptedTeam(scripts, coming), 0, steps)


def team(*lengths: int, **kwargs: Any) -> ScriptedTeam:
    return ScriptedTeam([[Episode(length, True, False)] for length in lengths], **kwargs)


def test_agents_that_are_gone_are_not_ready_until_all_are() -> None:
    env = team(1, 2, 3)
    stepper = make_stepper([env], Watch(), {"step": np.int64})
    stepper.reset([7, 8, 9])
    recorder = Recorder(stepper)
    ready, steps = [], []
    for _ in range(4):
        ready.append(stepper.ready.tolist())
        recorder.step()
        steps.append(stepper.info[0][stepper.stepped].tolist())
    assert steps == [[1, 1, 1], [2, 2], [3], [1, 1, 1]]
    assert ready == [[0, 1, 2], [1, 2], [2], [0, 1, 2]]
    assert env.seeds == [7, None]


@pytest.mark.parametrize("at", [("step", 0), ("reset", 0), ("reset", 1)])
def test_a_team_fails_and_is_replaced_as_a_whole(at: tuple[str, int]) -> None:
    env = team(1, 1, at={at: fail})
    stepper = make_stepper([env], Watch(), ())
    stepper.reset([0, 1])
    recorder = Recorder(stepper)
    if at != ("reset", 0):
        recorder.step()
    ((member, error),) = stepper.failures
    assert (member, str(error)) == (0, "the motor is hot")
    assert env.closed
    assert len(stepper.ready) == 0
    assert stepper.stepped.tolist() == ([0, 1] if at == ("reset", 1) else [])
    stepper.replace(0, team(1, 1, 1), [2, 3])
    assert "the new environment has the agents" in str(stepper.failures[0][1])
    stepper.replace(0, team(1, 1), [2, 3])
    assert stepper.ready.tolist() == [0, 1]
    recorder = Recorder(stepper)
    recorder.step()
    assert recorder.seen == plain_loop(team(1, 1), 2, 1)


@pytest.mark.parametrize("at", [("step", 0), ("reset", 0), ("reset", 1)])
def test_a_hung_team_is_taken_over(at: tuple[str, int]) -> None:
    gate = Gate()
    watch = Watch()
    stepper = make_stepper([team(1, 1, at={at: gate})], watch, ())
    recorder = Recorder(stepper)
    if at == ("reset", 0):
        thread = Abandonable(stepper.reset, [0, 1])
    else:
        stepper.reset([0, 1])
        thread = Abandonable(stepper.step, stepper.ready, [recorder.ask(stepper.ready)])
    assert gate.entered.wait(HANG)
    assert watch.phase[0] == (Phase.STEP if at[0] == "step" else Phase.RESET)
    assert stepper.take_over() == 0
    stepper.resume()
    assert [type(error) for _, error in stepper.failures] == [TimeoutError]
    assert stepper.stepped.tolist() == ([0, 1] if at == ("reset", 1) else [])
    assert len(stepper.ready) == 0
    gate.opened.set()
    assert thread.join() == [Abandoned]


class OtherAgent(ScriptedTeam):
    def observation_space(self, agent: str) -> Any:
        return spaces.Box(-1, 1, (3 if agent == "agent 1" else 4,), np.float32)


class NoFinalObservation(ScriptedTeam):
    def step(self, actions: dict[str, int]) -> Any:
        observations, *rest = super().step(actions)
        return {agent: observations[agent] for agent in self.agents}, *rest


class NobodyLeft(ScriptedTeam):
    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        result = super().reset(seed)
        self.agents = []
        return result


def test_what_a_team_returns_in_another_layout_is_its_failure() -> None:
    with pytest.raises(ValueError, match="agent 'agent 1' has the layout"):
        make_stepper([OtherAgent([[Episode(1, True, False)]] * 2)], Watch(), ())
    stepper = make_stepper([NoFinalObservation([[Episode(1, True, False)]] * 2)], Watch(), ())
    stepper.reset([0, 1])
    Recorder(stepper).step()
    assert str(stepper.failures[0][1]) == "step() has returned no observation of 'agent 0', who had an action"
    stepper = make_stepper([NobodyLeft([[Episode(1, True, False)]] * 2)], Watch(), ())
    stepper.reset([0, 1])
    assert str(stepper.failures[0][1]) == "reset() has left no agents"
    assert len(stepper.ready) == 0


def test_the_scripted_team_is_an_environment_of_pettingzoo() -> None:
    test = pytest.importorskip("pettingzoo.test")
    with warnings.catch_warnings(action="ignore"):
        test.parallel_api_test(team(2, 3, late=[0, 1]), num_cycles=20)
