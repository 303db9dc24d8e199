from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
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
    ScriptedEnv,
    Transition,
    action_of,
    fail,
)
from tests.limits import HANG

torchrl_envs = pytest.importorskip("torchrl.envs")


class FromZero(ScriptedEnv):
    action_space = spaces.Discrete(8)


def single(script: list[Episode], **kwargs: Any) -> Any:
    return torchrl_envs.GymWrapper(FromZero(script, **kwargs), categorical_action_encoding=True)


def several(scripts: list[list[Episode]]) -> Any:
    return torchrl_envs.SerialEnv(len(scripts), [lambda script=script: single(script) for script in scripts])


def torchrl_loop(env: Any, seed: int, steps: int, first_row: int = 0) -> list[list[Transition]]:
    """What a loop of torchrl's by hand sees, for each row."""
    env.set_seed(seed)
    root = env.reset()
    rows = env.batch_size.numel()
    seen: list[list[Transition]] = [[] for _ in range(rows)]
    is_init = [True] * rows
    for step in range(steps):
        actions = [action_of(first_row + row, step) for row in range(rows)]
        root["action"] = torch.tensor(actions).reshape(env.batch_size)
        observations = root["observation"].reshape(rows, 4).tolist()
        transition, root = env.step_and_maybe_reset(root)
        following = transition["next"]
        for row in range(rows):
            terminated, truncated = (
                bool(following[key].reshape(rows)[row].item()) for key in ("terminated", "truncated")
            )
            seen[row].append(
                Transition(
                    tuple(observations[row]),
                    is_init[row],
                    actions[row],
                    following["reward"].reshape(rows)[row].item(),
                    tuple(following["observation"].reshape(rows, 4)[row].tolist()),
                    terminated,
                    truncated and not terminated,
                )
            )
            is_init[row] = terminated or truncated
    return seen


@settings(max_examples=10)
@given(scripts=st.lists(EPISODES, min_size=1, max_size=3), batched=st.booleans(), data=st.data())
def test_rows_see_what_a_loop_of_torchrl_sees(scripts: list[list[Episode]], batched: bool, data: st.DataObject) -> None:
    stepper = make_stepper([several(scripts)] if batched else [single(script) for script in scripts], Watch(), ())
    assert stepper.min_rows == (len(scripts) if batched else 1)
    stepper.reset(range(len(scripts)))
    recorder = Recorder(stepper)
    for _ in range(data.draw(st.integers(1, 8))):
        recorder.step(lambda ready: sorted(data.draw(st.sets(st.sampled_from(ready), min_size=1, max_size=len(ready)))))
        assert not stepper.failures
    recorder.step()
    if batched:
        assert recorder.seen == torchrl_loop(several(scripts), 0, len(recorder.seen[0]))
    else:
        for row, script in enumerate(scripts):
            assert [recorder.seen[row]] == torchrl_loop(single(script), row, len(recorder.seen[row]), row)
    stepper.close()


def test_a_member_that_fails_is_replaced_and_the_others_lose_no_step() -> None:
    script = [Episode(2, True, False)]
    stepper = make_stepper([single(script), single(script, at={("step", 1): fail})], Watch(), ())
    stepper.reset([0, 1])
    recorder = Recorder(stepper)
    recorder.step()
    recorder.step()
    ((member, error),) = stepper.failures
    assert (member, str(error)) == (1, "the motor is hot")
    assert stepper.ready.tolist() == stepper.stepped.tolist() == [0]
    stepper.replace(1, several([script]), [5])
    assert "the new environment has batch size [1]" in str(stepper.failures[0][1])
    stepper.replace(1, single(script), [5])
    assert stepper.ready.tolist() == [0, 1]
    recorder.seen[1].clear()
    recorder.step()
    assert recorder.seen[1] == torchrl_loop(single(script), 5, 1, 1)[0]
    assert recorder.seen[0] == torchrl_loop(single(script), 0, 3)[0]


@pytest.mark.parametrize("at", [("step", 0), ("reset", 0)])
def test_a_hung_member_is_taken_over(at: tuple[str, int]) -> None:
    gate = Gate()
    script = [Episode(2, True, False)]
    watch = Watch()
    stepper = make_stepper([single(script), single(script, at={at: gate}), single(script)], watch, ())
    recorder = Recorder(stepper)
    if at[0] == "reset":
        thread = Abandonable(stepper.reset, range(3))
    else:
        stepper.reset(range(3))
        thread = Abandonable(stepper.step, stepper.ready, [recorder.ask(stepper.ready)])
    assert gate.entered.wait(HANG)
    assert (watch.member[0], watch.phase[0]) == (1, Phase.RESET if at[0] == "reset" else Phase.STEP)
    assert stepper.take_over() == 1
    stepper.resume()
    assert stepper.ready.tolist() == [0, 2]
    assert stepper.stepped.tolist() == ([] if at[0] == "reset" else [0, 2])
    assert [type(error) for _, error in stepper.failures] == [TimeoutError]
    gate.opened.set()
    assert thread.join() == [Abandoned]


class Nested(FromZero):
    """Observes a dictionary."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key
        self.observation_space = spaces.Dict({key: self.observation_space, "count": spaces.Box(0, 9, (), np.int64)})

    def observe(self, action: int) -> Any:
        return {self._key: super().observe(action), "count": np.int64(self._step)}


def test_observations_have_their_own_keys_and_none_that_batches_have_anyway() -> None:
    stepper = make_stepper([torchrl_envs.GymWrapper(Nested("pixels"))], Watch(), ())
    assert [spec.path for spec in stepper.layout.observation] == [("count",), ("pixels",)]
    assert [(spec.shape, spec.dtype) for spec in stepper.layout.action] == [((8,), np.dtype(np.int64))]
    tracked = torchrl_envs.TransformedEnv(single([Episode(1, True, False)]), torchrl_envs.InitTracker())
    with pytest.raises(ValueError, match='the observation "is_init" of TransformedEnv has the name of an entry'):
        make_stepper([tracked], Watch(), ())


def test_entries_beside_the_observations_are_stored_as_infos() -> None:
    env = torchrl_envs.TransformedEnv(single([Episode(9, True, False)]), torchrl_envs.StepCounter())
    stepper = make_stepper([env], Watch(), {"step_count": np.int64, "absent": np.float32})
    stepper.reset([0])
    Recorder(stepper).step()
    assert stepper.info[0].tolist() == [1]
    assert np.isnan(stepper.info[1]).all()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, np.array([1, 5], np.float32), (2,), np.float32),
        spaces.Discrete(4),
        spaces.MultiDiscrete([3, 5]),
        spaces.MultiBinary(3),
    ],
)
@pytest.mark.parametrize("categorical", [False, True])
def test_random_actions_are_of_the_spec_and_depend_on_the_seed_of_the_row_alone(space: Any, categorical: bool) -> None:
    def make() -> Any:
        class Arm(ScriptedEnv):
            action_space = space

            def step(self, action: Any) -> Any:
                assert self.action_space.contains(action), action
                return self.observe(0), 0.0, False, False, {}

        env: gymnasium.Env[Any, Any] = Arm()
        return torchrl_envs.GymWrapper(env, categorical_action_encoding=categorical)

    one, other = make_stepper([make(), make()], Watch(), ()), make_stepper([make()], Watch(), ())
    one.reset([1, 2])
    other.reset([2])
    drawn = []
    for _ in range(4):
        actions = one.random_actions(one.ready)
        assert actions[0].shape == (2, *one.layout.action[0].shape)
        drawn.append(actions[0].tolist())
        one.step(one.ready, actions)
        assert not one.failures
    assert [pair[1] for pair in drawn] == [other.random_actions(other.ready)[0].tolist()[0] for _ in range(4)]
    assert [pair[0] for pair in drawn] != [pair[1] for pair in drawn]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one.random_actions(one.ready)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_environment_of_several_rows_is_a_group_by_itself() -> None:
    script = [Episode(1, True, False)]
    with pytest.raises(ValueError, match="so that it is a group by itself"):
        make_stepper([several([script, script]), single(script)], Watch(), ())
