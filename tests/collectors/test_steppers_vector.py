from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from aioinfer.collectors.environments import Abandoned, Stepper, make_stepper
from aioinfer.collectors.watch import Phase, Watch
from tests.collectors.scripted_env import (
    EPISODES,
    Abandonable,
    Episode,
    Gate,
    NestedEnv,
    Recorder,
    ScriptedEnv,
    fail,
    plain_loop,
)
from tests.limits import HANG

MODES = list(AutoresetMode)


def vector(envs: list[Any], mode: AutoresetMode = AutoresetMode.NEXT_STEP, copy: bool = True) -> Any:
    return SyncVectorEnv([lambda env=env: env for env in envs], copy=copy, autoreset_mode=mode)  # type: ignore[misc]


def started(env: Any, info_keys: Any = (), leaf: int = 0) -> tuple[Stepper, Recorder]:
    stepper = make_stepper([env], Watch(), info_keys)
    stepper.reset(range(env.num_envs))
    return stepper, Recorder(stepper, leaf)


@settings(max_examples=60)
@given(
    scripts=st.lists(EPISODES, min_size=1, max_size=4),
    mode=st.sampled_from(MODES),
    kind=st.sampled_from([ScriptedEnv, NestedEnv]),
    copy=st.booleans(),
    reuse=st.booleans(),
    data=st.data(),
)
def test_rows_see_what_a_plain_loop_sees_in_each_autoreset_mode(
    scripts: list[list[Episode]],
    mode: AutoresetMode,
    kind: type[ScriptedEnv],
    copy: bool,
    reuse: bool,
    data: st.DataObject,
) -> None:
    env = vector([kind(script) for script in scripts], mode, copy)
    stepper, recorder = started(ReusingFlags(env) if reuse else env, leaf=2 if kind is NestedEnv else 0)
    assert stepper.min_rows == len(scripts)
    for _ in range(data.draw(st.integers(1, 15))):
        assert stepper.ready.tolist()
        recorder.step(lambda ready: sorted(data.draw(st.sets(st.sampled_from(ready), min_size=1, max_size=len(ready)))))
        assert not stepper.failures
    recorder.step()  # those that have waited
    for row, seen in enumerate(recorder.seen):
        assert seen == plain_loop(ScriptedEnv(scripts[row]), row, len(seen), row)
    if mode is not AutoresetMode.NEXT_STEP:
        assert len({len(seen) for seen in recorder.seen}) == 1
    assert all(recorder.seen)
    stepper.close()


class NothingOfOthers(gymnasium.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    """Returns nothing of rows that a reset leaves alone."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        mask = (options or {}).get("reset_mask")
        observations, infos = super().reset(seed=seed, options=options)
        if mask is not None:
            observations = observations.copy()
            observations[~mask] = np.nan
        return observations, infos


def test_a_reset_of_some_rows_leaves_the_others_alone() -> None:
    scripts = [Episode(1, True, False)], [Episode(3, True, False)]
    env = vector([ScriptedEnv(script) for script in scripts], AutoresetMode.DISABLED)
    _, recorder = started(NothingOfOthers(env))
    for _ in range(4):
        recorder.step()
    for row, script in enumerate(scripts):
        assert recorder.seen[row] == plain_loop(ScriptedEnv(script), row, 4, row)


class ReusingFlags(gymnasium.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    """Returns the same arrays again and again, written anew."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._flags = [np.zeros(env.num_envs) for _ in range(3)]

    def reset(self, **kwargs: Any) -> Any:
        for array in self._flags:
            array[:] = 9
        return super().reset(**kwargs)

    def step(self, actions: Any) -> Any:
        observation, *flags, infos = super().step(actions)
        for array, flag in zip(self._flags, flags, strict=True):
            array[:] = flag
        return observation, *self._flags, infos


@pytest.mark.parametrize("mode", MODES)
def test_nested_observations_keep_their_leaves_together(mode: AutoresetMode) -> None:
    env = vector([NestedEnv([Episode(2, True, False)]), NestedEnv([Episode(3, False, True)])], mode)
    stepper, recorder = started(env, leaf=2)
    assert [spec.path[1:] for spec in stepper.layout.observation] == [("more", "0"), ("more", "1"), ("values",)]
    for _ in range(8):
        recorder.step()
        for row in stepper.stepped.tolist():
            number, text, values = (leaf[row] for leaf in stepper.next_observations)
            assert (number, text) == (values[2], f"step {number}")
        for row in stepper.ready.tolist():
            number, text, values = (leaf[row] for leaf in stepper.observations)
            assert (number, text) == (values[2], f"step {number}")
            assert (number == 0) == stepper.is_init[row]


@pytest.mark.parametrize("mode", MODES)
def test_infos_of_a_last_step_are_those_of_that_step(mode: AutoresetMode) -> None:
    env = vector([ScriptedEnv([Episode(1, True, False)]), ScriptedEnv([Episode(2, True, False)])], mode)
    stepper, recorder = started(env, info_keys={"twice": np.float32})
    recorder.step()
    assert stepper.stepped.tolist() == [0, 1]
    assert stepper.info[0].tolist() == [2, 2]
    recorder.step()
    if mode is AutoresetMode.NEXT_STEP:
        assert stepper.stepped.tolist() == [1]
        assert stepper.info[0][0] == 2
    assert np.isnan(stepper.info[0][1])


def test_a_row_that_is_reset_by_a_step_is_neither_ready_nor_stepped() -> None:
    stepper, recorder = started(
        vector([ScriptedEnv([Episode(1, True, False)]), ScriptedEnv([Episode(3, True, False)])])
    )
    recorder.step()
    assert stepper.stepped.tolist() == [0, 1]
    assert stepper.ready.tolist() == [1]
    recorder.step()
    assert stepper.stepped.tolist() == [1]
    assert stepper.ready.tolist() == [0, 1]
    assert stepper.is_init.tolist() == [True, False]


def test_rows_that_end_together_are_reset_at_once() -> None:
    stepper, recorder = started(vector([ScriptedEnv([Episode(1, True, False)]) for _ in range(2)]))
    recorder.step()
    assert stepper.stepped.tolist() == [0, 1]
    assert stepper.ready.tolist() == [0, 1]
    assert stepper.is_init.all()


def test_rows_with_an_action_wait_for_the_others() -> None:
    stepper, recorder = started(vector([ScriptedEnv(), ScriptedEnv(), ScriptedEnv()]))
    recorder.step(lambda ready: [0, 2])
    assert stepper.stepped.tolist() == []
    assert stepper.ready.tolist() == [1]
    recorder.step()
    assert stepper.stepped.tolist() == [0, 1, 2]


def test_the_autoreset_mode_is_next_step_where_it_is_not_said() -> None:
    env = vector([ScriptedEnv([Episode(1, True, False)]), ScriptedEnv()])
    env.metadata = {}
    stepper, recorder = started(env)
    recorder.step()
    assert stepper.ready.tolist() == [1]
    env.metadata = {"autoreset_mode": "sometimes"}
    with pytest.raises(ValueError, match="is 'sometimes', expected NEXT_STEP"):
        make_stepper([env], Watch(), ())
    env.metadata = {"autoreset_mode": "SameStep"}
    make_stepper([env], Watch(), ())


def test_an_environment_that_takes_one_seed_gets_the_first() -> None:
    stepper = make_stepper([CartPoleVectorEnv(3)], Watch(), ())
    stepper.reset([5, 6, 7])
    assert not stepper.failures
    assert np.array_equal(stepper.observations[0], CartPoleVectorEnv(3).reset(seed=5)[0])
    for _ in range(50):
        stepper.step(stepper.ready, stepper.random_actions(stepper.ready))
    assert not stepper.failures


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [("step", 0), ("reset", 0), ("reset", 1)])
def test_a_vector_environment_fails_and_is_replaced_as_a_whole(mode: AutoresetMode, at: tuple[str, int]) -> None:
    script = [Episode(1, True, False)]
    envs = [ScriptedEnv(script), ScriptedEnv(script, at={at: fail})]
    stepper, recorder = started(vector(envs, mode))
    if at != ("reset", 0):
        recorder.step()
    ((member, error),) = stepper.failures
    assert (member, str(error)) == (0, "the motor is hot")
    assert len(stepper.ready) == 0
    assert all(env.closed for env in envs)
    # A step was complete if it was a reset of its own that failed.
    complete = at[0] == "reset" and mode is not AutoresetMode.SAME_STEP and at[1] == 1
    assert stepper.stepped.tolist() == ([0, 1] if complete else [])
    stepper.replace(0, vector([ScriptedEnv(script), ScriptedEnv(script)], mode), [3, 4])
    assert stepper.ready.tolist() == [0, 1]
    recorder = Recorder(stepper)
    recorder.step()
    recorder.step()
    for row, seen in enumerate(recorder.seen):
        assert seen == plain_loop(ScriptedEnv(script), 3 + row, 2, row)


def test_a_new_vector_environment_of_another_layout_is_refused() -> None:
    stepper, recorder = started(vector([ScriptedEnv(at={("step", 0): fail}), ScriptedEnv()]))
    recorder.step()
    stepper.replace(0, vector([ScriptedEnv()]), [1, 2])
    assert "the new environment has 1 rows" in str(stepper.failures[0][1])
    assert len(stepper.ready) == 0


class OtherShape(gymnasium.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    def step(self, actions: Any) -> Any:
        observation, *rest = super().step(actions)
        return observation[:, :3], *rest


class NoFinalObservation(gymnasium.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    def step(self, actions: Any) -> Any:
        return *super().step(actions)[:-1], {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherShape, "observation has shape [2, 3], 2 rows of its space have [2, 4]"),
        (NoFinalObservation, "'final_observation'"),
    ],
)
def test_what_a_vector_environment_returns_in_another_layout_is_its_failure(kind: Any, message: str) -> None:
    script = [Episode(1, True, False)]
    stepper, recorder = started(kind(vector([ScriptedEnv(script), ScriptedEnv(script)], AutoresetMode.SAME_STEP)))
    recorder.step()
    ((_, error),) = stepper.failures
    assert str(error) == message
    assert len(stepper.ready) == 0
    assert stepper.stepped.tolist() == []


@pytest.mark.parametrize("at", [("step", 0), ("reset", 0), ("reset", 1)])
@pytest.mark.parametrize("mode", MODES)
def test_a_hung_vector_environment_is_taken_over(mode: AutoresetMode, at: tuple[str, int]) -> None:
    gate = Gate()
    script = [Episode(1, True, False)]
    watch = Watch()
    stepper = make_stepper([vector([ScriptedEnv(script), ScriptedEnv(script, at={at: gate})], mode)], watch, ())
    if at == ("reset", 0):
        thread = Abandonable(stepper.reset, [0, 1])
    else:
        stepper.reset([0, 1])
        recorder = Recorder(stepper)
        rows = stepper.ready
        thread = Abandonable(stepper.step, rows, [recorder.ask(rows)])
    assert gate.entered.wait(HANG)
    in_reset = at == ("reset", 0) or (at[0] == "reset" and mode is AutoresetMode.DISABLED)
    assert watch.phase[0] == (Phase.RESET if in_reset else Phase.STEP)
    assert stepper.take_over() == 0
    stepper.resume()
    assert [(member, type(error)) for member, error in stepper.failures] == [(0, TimeoutError)]
    assert len(stepper.ready) == 0
    gate.opened.set()
    assert thread.join() == [Abandoned]
    assert len(stepper.ready) == 0
    stepper.replace(0, vector([ScriptedEnv(script), ScriptedEnv(script)], mode), [3, 4])
    assert stepper.ready.tolist() == [0, 1]


def test_a_vector_environment_is_a_group_by_itself() -> None:
    with pytest.raises(ValueError, match="so that it is a group by itself; got 2"):
        make_stepper([vector([ScriptedEnv()]), vector([ScriptedEnv()])], Watch(), ())


def test_objects_of_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="is no environment of a known kind: it has no observation_space"):
        make_stepper(["an environment"], Watch(), ())
    env: Any = ScriptedEnv()
    env.num_envs = 3
    with pytest.raises(TypeError, match="is of several environments, but has no single_observation_space"):
        make_stepper([env], Watch(), ())
    env.agent_iter = iter
    with pytest.raises(TypeError, match="make a parallel environment of it"):
        make_stepper([env], Watch(), ())


def test_actions_of_nested_spaces_reach_vector_environments() -> None:
    taken: list[Any] = []

    class Arm(ScriptedEnv):
        action_space = spaces.Dict(  # type: ignore[assignment]
            {
                "grip": spaces.Discrete(3, start=1),
                "joints": spaces.Tuple([spaces.Box(-1, 1, (2,), np.float64), spaces.MultiBinary(3)]),
            }
        )

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            taken.append(action)
            return self.observe(0), 0.0, False, False, {}

    for env in (vector([Arm(), Arm()]), Arm()):
        stepper = make_stepper([env], Watch(), ())
        stepper.reset(range(stepper.size))
        leaves = stepper.random_actions(stepper.ready)
        stepper.step(stepper.ready, leaves)
        assert not stepper.failures
        assert [action["grip"] for action in taken] == leaves[0].tolist()
        assert np.array_equal([action["joints"][0] for action in taken], leaves[1])
        assert np.array_equal([action["joints"][1] for action in taken], leaves[2])
        taken.clear()
