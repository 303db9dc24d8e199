from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioinfer.collectors.environments import Abandoned, Stepper, is_async, make_stepper
from aioinfer.collectors.watch import Phase, Watch
from tests.collectors.scripted_env import (
    EPISODES,
    Abandonable,
    Episode,
    Gate,
    NestedEnv,
    Recorder,
    ScriptedEnv,
    Transition,
    fail,
    plain_loop,
)
from tests.limits import HANG


def of_layout(shape: Any, dtype: Any = np.float32) -> Callable[[], Any]:
    return lambda: np.zeros(shape, dtype)


def started(*envs: Any, info_keys: Any = ()) -> tuple[Stepper, Recorder]:
    stepper = make_stepper(envs, Watch(), info_keys)
    stepper.reset(range(len(envs)))
    return stepper, Recorder(stepper)


@settings(max_examples=60)
@given(
    scripts=st.lists(EPISODES, min_size=1, max_size=4),
    kind=st.sampled_from([ScriptedEnv, NestedEnv]),
    reuse=st.booleans(),
    data=st.data(),
)
def test_rows_see_what_a_plain_loop_sees(
    scripts: list[list[Episode]], kind: type[ScriptedEnv], reuse: bool, data: st.DataObject
) -> None:
    stepper, _ = started(*[kind(script, reuse=reuse) for script in scripts])
    recorder = Recorder(stepper, leaf=2 if kind is NestedEnv else 0)
    for _ in range(data.draw(st.integers(1, 12))):
        recorder.step(lambda ready: sorted(data.draw(st.sets(st.sampled_from(ready), min_size=1, max_size=len(ready)))))
        assert stepper.ready.tolist() == list(range(len(scripts)))
        assert not stepper.failures
    for row, seen in enumerate(recorder.seen):
        assert seen == plain_loop(ScriptedEnv(scripts[row]), row, len(seen), row)


@settings(max_examples=60)
@given(
    scripts=st.lists(EPISODES, min_size=2, max_size=4),
    trouble=st.dictionaries(
        st.integers(0, 3),
        st.tuples(
            st.sampled_from(["step", "reset"]),
            st.integers(0, 6),
            st.sampled_from([fail, of_layout(3), of_layout(4, np.complex64), SystemExit, lambda: "text"]),
        ),
        min_size=1,
    ),
)
def test_a_member_that_fails_is_replaced_and_the_others_lose_no_step(
    scripts: list[list[Episode]], trouble: dict[int, tuple[str, int, Any]]
) -> None:
    def raising(row: int) -> dict[tuple[str, int], Any]:
        if row not in trouble:
            return {}
        name, number, what = trouble[row]
        if what is SystemExit:
            return {(name, number): lambda: (_ for _ in ()).throw(SystemExit())}
        return {(name, number): what}

    envs = [ScriptedEnv(script, at=raising(row)) for row, script in enumerate(scripts)]
    stepper = make_stepper(envs, Watch(), ())
    recorder = Recorder(stepper)
    pieces: list[list[list[Transition]]] = [[] for _ in scripts]
    seeds = list(range(len(scripts)))
    stepper.reset(seeds)
    for number in range(10):
        failed = [member for member, _ in stepper.failures]
        assert stepper.ready.tolist() == [row for row in range(len(scripts)) if row not in failed]
        for member in failed:
            assert envs[member].closed
            pieces[member].append(recorder.seen[member])
            recorder.seen[member] = []
            seeds[member] = 100 + member
            stepper.replace(member, ScriptedEnv(scripts[member]), [seeds[member]])
            assert not stepper.failures
        assert stepper.ready.tolist() == list(range(len(scripts)))
        if number < 9:
            recorder.step()
    for row, script in enumerate(scripts):
        for piece in pieces[row]:
            assert piece == plain_loop(ScriptedEnv(script), row, len(piece), row)
        seen = recorder.seen[row]
        assert seen == plain_loop(ScriptedEnv(script), seeds[row], len(seen), row)
        assert sum(map(len, pieces[row])) + len(seen) >= 9 - len(pieces[row])


@pytest.mark.parametrize("name", ["step", "reset"])
def test_what_an_environment_raises_is_its_failure(name: str) -> None:
    env = ScriptedEnv([Episode(1, True, False)], at={(name, 1): fail})
    stepper, recorder = started(ScriptedEnv(), env, ScriptedEnv())
    while not stepper.failures:
        recorder.step()
    ((member, error),) = stepper.failures
    assert member == 1
    assert str(error) == "the motor is hot"
    assert stepper.ready.tolist() == [0, 2]
    assert env.closed
    # Its step was complete if it was the reset that failed.
    assert stepper.stepped.tolist() == ([0, 2] if name == "step" else [0, 1, 2])


@pytest.mark.parametrize("name", ["step", "reset"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (of_layout(3), "observation has shape [3], its space has [4]"),
        (of_layout((1, 4)), "observation has shape [1, 4], its space has [4]"),
        (of_layout(4, np.complex64), "observation has dtype complex64, its space has float32"),
    ],
)
def test_an_observation_of_another_layout_is_a_failure_by_name(name: str, value: Any, message: str) -> None:
    env = ScriptedEnv([Episode(2, True, False)], at={(name, 1): value})
    stepper, recorder = started(ScriptedEnv(), env, ScriptedEnv())
    while not stepper.failures:
        recorder.step()
    assert env.closed
    # What its last step has returned is wrong: it is not reset.
    assert len(env.seeds) == (1 if name == "step" else 2)
    ((member, error),) = stepper.failures
    assert member == 1
    assert str(error) == message
    assert isinstance(error, ValueError)


def test_observations_of_another_floating_point_type_are_cast() -> None:
    stepper, recorder = started(ScriptedEnv(dtype=np.float64), ScriptedEnv(dtype=np.int64))
    recorder.step()
    assert not stepper.failures
    assert stepper.observations[0].dtype == np.float32
    assert stepper.stepped.tolist() == [0, 1]


class FourValues(ScriptedEnv):
    def step(self, action: Any) -> Any:
        return super().step(action)[:4]


class ManyFlags(ScriptedEnv):
    def step(self, action: Any) -> Any:
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, np.zeros(3, bool), truncated, info


class ManyRewards(ScriptedEnv):
    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, [1.0, 2.0], terminated, truncated, info


class ResetToNothing(ScriptedEnv):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0]


@pytest.mark.parametrize("kind", [FourValues, ManyFlags, ManyRewards, ResetToNothing])
def test_an_environment_that_returns_something_else_is_a_failure(kind: type[ScriptedEnv]) -> None:
    stepper, recorder = started(ScriptedEnv(), kind())
    if not stepper.failures:
        recorder.step()
    ((member, error),) = stepper.failures
    assert member == 1
    assert isinstance(error, ValueError)
    assert stepper.ready.tolist() == [0]


@pytest.mark.parametrize(
    "change",
    [
        {"observation_space": gymnasium.spaces.Box(-1, 1, (5,), np.float32)},
        {"observation_space": gymnasium.spaces.Box(-1, 1, (4,), np.float64)},
        {"action_space": gymnasium.spaces.Box(-1, 1, (2,), np.float32)},
    ],
)
def test_layouts_that_differ_are_refused_by_name(change: dict[str, Any]) -> None:
    other = ScriptedEnv()
    vars(other).update(change)
    with pytest.raises(ValueError, match="environment 1 of the group has the layout"):
        make_stepper([ScriptedEnv(), other], Watch(), ())
    stepper, recorder = started(ScriptedEnv(at={("step", 0): fail}), ScriptedEnv())
    recorder.step()
    stepper.replace(0, other, [7])
    ((member, error),) = stepper.failures
    assert member == 0
    assert "the new environment has the layout" in str(error)
    assert other.closed
    assert stepper.ready.tolist() == [1]
    stepper.replace(0, ScriptedEnv(), [8])
    assert stepper.ready.tolist() == [0, 1]


def test_both_flags_mean_terminated() -> None:
    stepper, recorder = started(ScriptedEnv([Episode(1, True, True)]), ScriptedEnv([Episode(1, False, True)]))
    recorder.step()
    assert stepper.terminated.tolist() == [True, False]
    assert stepper.truncated.tolist() == [False, True]


def test_seeds_are_given_once() -> None:
    envs = [ScriptedEnv([Episode(1, True, False)]) for _ in range(2)]
    stepper = make_stepper(envs, Watch(), ())
    stepper.reset([5, 6])
    Recorder(stepper).step()
    assert [env.seeds for env in envs] == [[5, None], [6, None]]


def test_entries_of_infos_are_stored_and_missing_ones_are_nan_or_zero() -> None:
    stepper, recorder = started(ScriptedEnv(), ScriptedEnv(), info_keys={"twice": np.int32, "absent": np.float32})
    recorder.step()
    assert stepper.info[0].tolist() == [2, 2]
    recorder.step(lambda ready: [1])
    assert stepper.info[0].tolist()[1] == 0
    assert np.isnan(stepper.info[1]).all()
    assert [spec.path for spec in stepper.layout.info] == [("info", "twice"), ("info", "absent")]


def test_random_actions_depend_on_the_seed_of_the_row_alone() -> None:
    one, _ = started(ScriptedEnv(), ScriptedEnv(), ScriptedEnv())
    other = make_stepper([ScriptedEnv()], Watch(), ())
    other.reset([2])
    rows = np.array([0, 2])
    drawn = [one.random_actions(rows)[0].tolist() for _ in range(20)]
    assert [pair[1] for pair in drawn] == [other.random_actions(np.array([0]))[0].item() for _ in range(20)]
    assert {value for pair in drawn for value in pair} == {3, 4, 5, 6, 7}
    assert [pair[0] for pair in drawn] != [pair[1] for pair in drawn]
    one.replace(0, ScriptedEnv(), [2])
    other.reset([2])
    again = [one.random_actions(rows[:1])[0].item() for _ in range(20)]
    assert again == [other.random_actions(np.array([0]))[0].item() for _ in range(20)]
    assert again == [pair[1] for pair in drawn]


def test_another_row_is_timed_each_step() -> None:
    stepper, recorder = started(ScriptedEnv(), ScriptedEnv(), ScriptedEnv())
    timed = set()
    for _ in range(3):
        recorder.step()
        row, seconds = stepper.sample
        timed.add(row)
        assert seconds > 0
    assert timed == {0, 1, 2}


def state_of(stepper: Stepper) -> Any:
    arrays = [*stepper.observations, *stepper.next_observations, stepper.reward, stepper.is_init, stepper.terminated]
    return [array.copy().tolist() for array in [*arrays, stepper.truncated, stepper.ready, stepper.stepped]]


@pytest.mark.parametrize("hung", [[0], [1], [3], [1, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_a_hung_step_is_taken_over_and_the_rest_of_it_is_done(hung: list[int], ends: str) -> None:
    gates = {row: Gate() for row in hung}

    def wait(row: int) -> Callable[[], None]:
        def wait_and_end() -> None:
            gates[row]()
            if ends == "raises":
                fail()

        return wait_and_end

    scripts = [[Episode(length, True, False)] for length in (1, 2, 3, 1)]
    watch = Watch()
    envs = [ScriptedEnv(scripts[row], at={("step", 1): wait(row)} if row in hung else {}) for row in range(4)]
    stepper = make_stepper(envs, watch, ())
    stepper.reset(range(4))
    recorder = Recorder(stepper)
    recorder.step()
    rows = stepper.ready
    threads = [Abandonable(stepper.step, rows, [recorder.ask(rows)])]
    for row in hung:
        assert gates[row].entered.wait(HANG)
        assert (watch.member[0], watch.phase[0]) == (row, Phase.STEP)
        assert stepper.take_over(HANG) is None
        assert stepper.take_over() == row
        threads.append(Abandonable(stepper.resume))
    assert threads[-1].join() == []
    recorder.keep()
    left = [row for row in range(4) if row not in hung]
    assert stepper.ready.tolist() == stepper.stepped.tolist() == left
    assert [(member, type(error)) for member, error in stepper.failures] == [(row, TimeoutError) for row in hung]
    assert "step() has not returned for" in str(stepper.failures[0][1])
    assert not any(env.closed for env in envs)
    assert watch.phase[0] == Phase.IDLE
    assert stepper.take_over() is None
    before = state_of(stepper)
    for gate in gates.values():
        gate.opened.set()
    assert [thread.join() for thread in threads[:-1]] == [[Abandoned]] * len(hung)
    assert state_of(stepper) == before
    if left:
        recorder.step()
    for row in left:
        assert recorder.seen[row] == plain_loop(ScriptedEnv(scripts[row]), row, 3, row)


@pytest.mark.parametrize("episode", [0, 1])
def test_a_hung_reset_is_taken_over_and_the_rest_of_it_is_done(episode: int) -> None:
    gate = Gate()
    scripts = [[Episode(1, True, False)], [Episode(1, False, True)], [Episode(1, True, False)]]
    envs = [
        ScriptedEnv(script, at={("reset", episode): gate} if row == 1 else {}) for row, script in enumerate(scripts)
    ]
    watch = Watch()
    stepper = make_stepper(envs, watch, ())
    recorder = Recorder(stepper)
    if episode == 0:
        thread = Abandonable(stepper.reset, range(3))
    else:
        stepper.reset(range(3))
        rows = stepper.ready
        thread = Abandonable(stepper.step, rows, [recorder.ask(rows)])
    assert gate.entered.wait(HANG)
    assert (watch.member[0], watch.phase[0]) == (1, Phase.RESET)
    assert stepper.take_over() == 1
    stepper.resume()
    recorder.keep()
    assert stepper.ready.tolist() == [0, 2]
    assert [str(error).split(" has")[0] for _, error in stepper.failures] == ["reset()"]
    gate.opened.set()
    assert thread.join() == [Abandoned]
    stepper.replace(1, ScriptedEnv(scripts[1]), [1])
    assert stepper.ready.tolist() == [0, 1, 2]
    assert stepper.is_init.tolist() == [True] * 3
    # The step before the reset that hung was complete.
    assert [len(seen) for seen in recorder.seen] == [episode] * 3
    recorder.step()
    for row in (0, 2):
        seen = recorder.seen[row]
        assert seen == plain_loop(ScriptedEnv(scripts[row]), row, 1 + episode, row)


def test_a_hung_close_is_taken_over_and_the_others_are_closed() -> None:
    gate = Gate()
    envs = [ScriptedEnv(), ScriptedEnv(at={("close", 0): gate}), ScriptedEnv(at={("close", 0): fail}), ScriptedEnv()]
    stepper, _ = started(*envs)
    thread = Abandonable(stepper.close)
    assert gate.entered.wait(HANG)
    assert stepper.take_over() == 1
    stepper.resume()
    assert all(env.closed for env in envs)
    assert not stepper.failures
    assert len(stepper.ready) == 0
    gate.opened.set()
    assert thread.join() == [Abandoned]
    stepper.close()


def test_either_the_call_returns_or_it_is_taken_over() -> None:
    for _ in range(30):
        stepper, recorder = started(ScriptedEnv(), ScriptedEnv())

        def step_on(recorder: Recorder = recorder) -> None:
            while True:
                recorder.step()

        thread = Abandonable(step_on)
        while (member := stepper.take_over()) is None:
            pass
        assert thread.join() == [Abandoned]
        stepper.resume()
        recorder.keep()
        assert [failed for failed, _ in stepper.failures] == [member]
        assert stepper.ready.tolist() == [1 - member]
        recorder.step()
        for row, seen in enumerate(recorder.seen):
            assert seen == plain_loop(ScriptedEnv(), row, len(seen), row)


def test_async_environments_are_told_apart() -> None:
    class Robot:
        async def reset(self) -> None: ...

        async def step(self, action: Any) -> None: ...

    assert is_async(Robot())
    assert not is_async(ScriptedEnv())
