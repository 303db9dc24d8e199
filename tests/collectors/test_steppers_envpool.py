from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioinfer.collectors.environments import Abandoned, make_stepper
from aioinfer.collectors.watch import Watch
from tests.collectors.scripted_env import (
    EPISODES,
    Abandonable,
    Episode,
    Gate,
    Recorder,
    ScriptedEnv,
    fail,
    plain_loop,
)
from tests.limits import HANG


class ScriptedPool:
    """Has the interface of an EnvPool: results come in batches, of rows in any order, in a buffer used again.

    Args:
        scripts: of each environment.
        batch_size: rows of a batch.
        order: draws which rows are done first.
        at: what is called in the n-th ``recv``.
    """

    def __init__(
        self,
        scripts: Sequence[Sequence[Episode]],
        batch_size: int,
        order: random.Random,
        at: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        self.num_envs = len(scripts)
        self.config = {"batch_size": batch_size, "max_num_players": 1}
        self.is_async = batch_size != len(scripts)
        self.closed = False
        self._envs = [ScriptedEnv(script) for script in scripts]
        self.single_observation_space = self._envs[0].observation_space
        self.single_action_space = self._envs[0].action_space
        self._order = order
        self._at = at or {}
        self._received = 0
        self._done: list[tuple[int, Any]] = []
        self._ended = [False] * self.num_envs
        self._buffer = np.zeros((batch_size, 4), np.float32)

    def async_reset(self) -> None:
        for row, env in enumerate(self._envs):
            self._done.append((row, (env.reset(seed=row)[0], 0.0, False, False)))

    def send(self, actions: Any, env_id: Any) -> None:
        assert env_id.dtype == np.int32
        for row, action in zip(env_id.tolist(), actions.tolist(), strict=True):
            assert row not in [done for done, _ in self._done]
            env = self._envs[row]
            result = (env.reset()[0], 0.0, False, False) if self._ended[row] else env.step(action)[:4]
            self._ended[row] = result[2] or result[3]
            self._done.append((row, result))

    def recv(self) -> Any:
        size = self.config["batch_size"]
        assert len(self._done) >= size, "this would never return"
        self._at.get(self._received, lambda: None)()
        self._received += 1
        self._order.shuffle(self._done)
        batch, self._done = self._done[:size], self._done[size:]
        rows, results = zip(*batch, strict=True)
        observations, rewards, terminated, truncated = zip(*results, strict=True)
        self._buffer[:] = observations
        infos = {"env_id": np.array(rows, np.int32), "lives": np.array(rows) + 10}
        return self._buffer, np.array(rewards), np.array(terminated), np.array(truncated), infos

    def close(self) -> None:
        self.closed = True


@settings(max_examples=60)
@given(scripts=st.lists(EPISODES, min_size=2, max_size=5), order=st.randoms(use_true_random=False), data=st.data())
def test_rows_see_what_a_plain_loop_sees(
    scripts: list[list[Episode]], order: random.Random, data: st.DataObject
) -> None:
    pool = ScriptedPool(scripts, data.draw(st.integers(1, len(scripts) - 1)), order)
    stepper = make_stepper([pool], Watch(), {"lives": np.int64})
    assert stepper.is_uneven
    stepper.reset(range(len(scripts)))
    recorder = Recorder(stepper)
    for _ in range(data.draw(st.integers(1, 15))):
        assert len(stepper.ready) > 0
        recorder.step(lambda ready: sorted(data.draw(st.sets(st.sampled_from(ready), min_size=1, max_size=len(ready)))))
        assert not stepper.failures
        assert stepper.stepped.tolist() == sorted(set(stepper.stepped.tolist()))
        assert (stepper.info[0][stepper.stepped] == stepper.stepped + 10).all()
    for row, seen in enumerate(recorder.seen):
        assert seen == plain_loop(ScriptedEnv(scripts[row]), row, len(seen), row)
    stepper.close()
    assert pool.closed


def pool(at: dict[int, Callable[[], None]] | None = None, batch_size: int = 2) -> ScriptedPool:
    return ScriptedPool([[Episode(2, True, False)]] * 3, batch_size, random.Random(0), at)


@pytest.mark.parametrize("number", [0, 1])
def test_a_pool_fails_and_is_replaced_as_a_whole(number: int) -> None:
    broken = pool({number: fail})
    stepper = make_stepper([broken], Watch(), ())
    stepper.reset(range(3))
    if number:
        Recorder(stepper).step()
    ((member, error),) = stepper.failures
    assert (member, str(error)) == (0, "the motor is hot")
    assert broken.closed
    assert len(stepper.ready) == 0
    stepper.replace(0, pool(batch_size=1), range(3))
    assert "the new environment has 3 rows, batch size 1" in str(stepper.failures[0][1])
    stepper.replace(0, pool(), range(3))
    assert len(stepper.ready) == 2
    recorder = Recorder(stepper)
    for _ in range(9):
        recorder.step()
    for row, seen in enumerate(recorder.seen):
        assert seen == plain_loop(ScriptedEnv([Episode(2, True, False)]), row, len(seen), row)


@pytest.mark.parametrize("number", [0, 1])
def test_a_hung_pool_is_taken_over(number: int) -> None:
    gate = Gate()
    stepper = make_stepper([pool({number: gate})], Watch(), ())
    if number == 0:
        thread = Abandonable(stepper.reset, range(3))
    else:
        stepper.reset(range(3))
        thread = Abandonable(Recorder(stepper).step)
    assert gate.entered.wait(HANG)
    assert stepper.take_over() == 0
    stepper.resume()
    assert [type(error) for _, error in stepper.failures] == [TimeoutError]
    assert len(stepper.ready) == 0
    gate.opened.set()
    assert thread.join() == [Abandoned]


def test_pools_of_several_players_are_refused() -> None:
    players = pool()
    players.config["max_num_players"] = 2
    with pytest.raises(ValueError, match="have 2 players, expected one"):
        make_stepper([players], Watch(), ())


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.filterwarnings("ignore")
def test_rows_of_an_envpool_see_what_a_loop_of_its_own_sees(batch_size: int) -> None:
    envpool = pytest.importorskip("envpool")
    rows, steps = 4, 120

    def make(batch: int) -> Any:
        return envpool.make("CartPole-v1", env_type="gymnasium", num_envs=rows, batch_size=batch, seed=3)

    stepper = make_stepper([make(batch_size)], Watch(), {"elapsed_step": np.int64})
    stepper.reset(range(rows))
    seen: list[list[Any]] = [[] for _ in range(rows)]
    while min(map(len, seen)) < steps:
        ready = stepper.ready
        assert len(ready) > 0
        stepper.step(ready, [np.array([len(seen[row]) // 3 % 2 for row in ready.tolist()])])
        assert not stepper.failures
        for row in stepper.stepped.tolist():
            seen[row].append((stepper.next_observations[0][row].tolist(), bool(stepper.terminated[row])))
    stepper.close()
    reference = make(rows)
    reference.reset()
    wanted: list[list[Any]] = [[] for _ in range(rows)]
    resetting = np.zeros(rows, bool)
    while min(map(len, wanted)) < steps:
        actions = np.array([len(wanted[row]) // 3 % 2 for row in range(rows)])
        observations, _, terminated, truncated, _ = reference.step(actions)
        for row in np.flatnonzero(~resetting).tolist():
            wanted[row].append((observations[row].tolist(), bool(terminated[row])))
        resetting = (terminated | truncated) & ~resetting
    assert any(terminated for _, terminated in wanted[0])
    for one, other in zip(seen, wanted, strict=True):
        assert one[:steps] == other[:steps]
