"""What a user may do that is not in the first example: each does what it should, or says what is wrong."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
)
from torch import nn
from torch.nn import functional

from aioinfer import InferenceServer, ServerNotRunningError, ThreadingTransport
from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.collectors.stats import shares_of_time
from aioinfer.collectors.watch import Watch
from tests.collectors.worlds import World, assert_plain, make_policy, steps_by_env
from tests.limits import HANG


def make_collector(make: Any = World, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 32, "fragment_length": 8}
    return AsyncBatchedCollector(make, **{**settings, **options})


@contextmanager
def in_thread(function: Any) -> Iterator[list[BaseException]]:
    """Run a function in a thread until the end of the block; what it raises is in the list."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield raised
    thread.join(HANG)
    assert not thread.is_alive()


@pytest.mark.parametrize("in_lockstep", [False, True])
def test_fragments_that_are_too_old_make_room_for_others(in_lockstep: bool) -> None:
    with make_collector(num_envs=3, max_policy_lag=0, in_lockstep=in_lockstep) as collector:
        for batch in itertools.islice(collector, 4):
            assert set(batch["policy_version"].unique().tolist()) == {collector.policy_version}
            with collector.pause():  # whatever is unread is of older weights
                collector.update_weights()


def test_whole_episodes_can_be_collected_in_lockstep() -> None:
    runs = []
    for _ in range(2):
        with make_collector(num_envs=3, in_lockstep=True, yield_completed_trajectories=True) as collector:
            runs.append([batch["next", "reward"].tolist() for batch in itertools.islice(collector, 4)])
    assert runs[0] == runs[1]


def test_a_server_that_does_not_run_is_refused() -> None:
    server = InferenceServer(make_policy(), ThreadingTransport())
    with pytest.raises(ServerNotRunningError, match="start it before"):
        make_collector(policy=None, server=server).start()


def test_it_can_be_shut_down_while_an_environment_is_being_made() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def make() -> Any:
        reached.set()
        go_on.wait(HANG)
        return World()

    collector = make_collector(make)
    try:
        with in_thread(collector.start) as raised:
            assert reached.wait(HANG)
            collector.shutdown(0.1)
        assert [str(error) for error in raised] == ["the collector was shut down; make another one"]
    finally:
        go_on.set()


def test_a_reader_whose_loop_is_gone_costs_the_next_one_nothing() -> None:
    go_on = threading.Event()

    class Waiting(World):
        def step(self, action: Any) -> Any:
            go_on.wait(HANG)
            return super().step(action)

    async def give_up() -> None:
        reading = asyncio.ensure_future(anext(aiter(collector)))
        await asyncio.sleep(0)
        reading.cancel()

    with make_collector(Waiting) as collector:
        asyncio.run(give_up())
        go_on.set()
        assert next(iter(collector)).shape == (4, 8)


def reply(count: int, **entries: Any) -> TensorDict:
    return TensorDict({"action": torch.zeros(count, dtype=torch.int64), **entries}, [count])


class Undeclared(TensorDictModuleBase):
    """Writes an entry of which its ``out_keys`` know nothing."""

    in_keys, out_keys = ["observation"], ["action"]

    def __init__(self) -> None:
        super().__init__()

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        return td.update(reply(len(td), more=torch.ones(len(td))))


def test_entries_that_a_policy_does_not_declare_are_left_out() -> None:
    with make_collector(policy=Undeclared()) as collector:
        assert "more" not in next(iter(collector))


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (lambda td: reply(len(td))["action"], TypeError, "returned a Tensor; a policy takes and returns a TensorDict"),
        (lambda td: {"action": 0}, TypeError, "returned a dict; a policy takes and returns a TensorDict"),
        (lambda td: reply(len(td), action=torch.zeros(len(td))), ValueError, "float32, the environments take int64"),
        (lambda td: reply(len(td), action=torch.zeros(len(td), 4)), ValueError, "its number, not one-hot"),
        (lambda td: reply(len(td), next=reply(len(td), hidden=td["observation"])), ValueError, "state_keys"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_with_the_way_out(policy: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make_collector(policy=policy).start()


def test_a_module_of_tensors_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError) as caught:
        make_collector(policy=torch.nn.Linear(3, 4)).start()
    assert "TensorDictModule(module, in_keys=" in caught.value.__notes__[0]


class SamplesOnly(torch.distributions.Categorical):
    @property
    def mode(self) -> Any:
        raise NotImplementedError

    deterministic_sample = mode


def test_a_policy_is_asked_in_the_exploration_mode_of_the_collector_only() -> None:
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(torch.nn.Linear(3, 4), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"],
            ["action"],
            distribution_class=SamplesOnly,
            default_interaction_type=InteractionType.DETERMINISTIC,
        ),
    )
    with make_collector(policy=policy, exploration_type="random") as collector:
        assert "logits" in next(iter(collector))


class Counting(gymnasium.Env[Any, Any]):
    """Observes the number of its step: in a space that starts at 5, and as a text."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            number=gymnasium.spaces.Discrete(3, start=5),
            constant=gymnasium.spaces.Discrete(1),
            text=gymnasium.spaces.Text(3, charset="567"),
        )
        self.action_space = gymnasium.spaces.Discrete(4)
        self.number = 5

    def _observe(self) -> Any:
        return {"number": self.number, "constant": 0, "text": str(self.number)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.number = 5
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.number += 1
        return self._observe(), 0.0, self.number == 7, False, {}


def test_a_policy_is_asked_only_with_observations_of_the_space_and_with_the_latest_texts() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        functional.one_hot(td["observation", "number"] - 5, 3), functional.one_hot(td["observation", "constant"], 1)
        texts = td.get(("observation", "text")).tolist()
        return reply(len(td), read=torch.tensor([int(text or "0") for text in texts]))

    with make_collector(Counting, policy=policy, num_envs=2) as collector:
        batch = next(iter(collector))
        assert torch.equal(batch["read"], batch["observation", "number"])
        assert set(batch["read"].unique().tolist()) == {5, 6}


class Overwriting(nn.Module):
    """Acts, and then writes to what it was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.act = make_policy().module

    def forward(self, observation: torch.Tensor) -> Any:
        action = self.act(observation.clone())
        observation.fill_(7)
        return action


@pytest.mark.parametrize("local_inference", [False, True])
def test_a_policy_may_write_to_what_it_is_asked_with(local_inference: bool) -> None:
    policy = TensorDictModule(Overwriting(), make_policy().in_keys, make_policy().out_keys)
    with make_collector(policy=policy, num_envs=3, local_inference=local_inference, seed=5) as collector:
        assert_plain(steps_by_env([batch.clone() for batch in itertools.islice(collector, 3)]), seed=5)


def test_a_server_whose_replies_have_no_version_is_refused() -> None:
    server = InferenceServer(make_policy(), ThreadingTransport(), policy_version_key=None)
    with server, pytest.raises(ValueError, match="policy_version_key"):
        make_collector(policy=None, server=server).start()


def watch(stepping: float, policy: float, without_row: float) -> Watch:
    made = Watch()
    made.seconds[:] = stepping, policy, without_row
    return made


@pytest.mark.parametrize(
    ("groups", "reader_waited", "limit"),
    [
        ([watch(9, 1, 0), watch(1, 0, 9)], 10, "environments"),  # of the first group, for which the second has to wait
        ([watch(1, 1, 8), watch(1, 1, 8)], 1, "reader"),
        ([watch(1, 9, 0), watch(1, 9, 0)], 10, "policy"),
    ],
)
def test_who_limits_is_who_the_others_wait_for(groups: list[Watch], reader_waited: float, limit: str) -> None:
    for hosts in ([groups], [[one] for one in groups]):
        shares = shares_of_time(hosts, started=0, now=10, reader_waited=reader_waited)
        assert sum(shares.values()) == pytest.approx(1)
        assert max(shares, key=lambda name: shares[name]) == limit


def test_figures_can_be_asked_for_at_any_time() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def make() -> Any:
        reached.set()
        go_on.wait(HANG)
        return World()

    collector = make_collector(make)
    assert collector.stats().frames == 0
    with in_thread(collector.start):
        assert reached.wait(HANG)
        assert collector.stats().frames == 0
        go_on.set()
    next(iter(collector))
    collector.shutdown()
    assert collector.stats() == collector.stats()
    assert collector.stats().frames == 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_timeout": 0}, ValueError, "step_timeout must be a number of seconds above 0, or None, got 0"),
        ({"reset_timeout": "5"}, ValueError, "reset_timeout must be a number of seconds above 0, or None, got '5'"),
        ({"max_policy_lag": -1}, ValueError, "max_policy_lag must be an integer of at least 0, got -1"),
        ({"num_envs": 2.0}, ValueError, "num_envs must be an integer of at least 1, got 2.0"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be an integer of at least 1, got 0"),
        ({"frames_per_batch": 30}, ValueError, "a multiple of fragment_length, which is 8, got 30"),
        ({"policy": 3}, TypeError, "policy must be callable, got int"),
        ({"postproc": 3}, TypeError, "postproc must be callable, got int"),
        ({"replay_buffer": 3}, TypeError, "replay_buffer.extend must be callable, got int"),
        ({"info_keys": "lives"}, TypeError, "must be a sequence of names or a mapping, got the string 'lives'"),
        ({"create_env_kwargs": 3}, TypeError, "create_env_kwargs must be a mapping or a sequence of them, got int"),
        ({"in_lockstep": True, "order": "first"}, ValueError, 'in_lockstep=True needs order="fair"'),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_at_once(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make_collector(**options)


def test_lockstep_is_refused_where_it_could_not_be_kept() -> None:
    with pytest.raises(ValueError, match="max_batch_size must be at least 2, got 1"):
        make_collector(num_envs=4, in_lockstep=True, max_batch_size=1).start()
    with pytest.raises(ValueError, match="autoreset_mode SAME_STEP or DISABLED"):
        make_collector(lambda: gymnasium.vector.SyncVectorEnv([World] * 2), in_lockstep=True).start()


def test_a_replay_buffer_gets_valid_steps_whatever_the_shape_after_postproc() -> None:
    buffer: list[Any] = []
    collector = make_collector(
        num_envs=3, total_frames=45, replay_buffer=buffer, postproc=lambda batch: batch.reshape(-1)
    )
    assert list(collector) == [None, None]
    assert len(buffer) == 45
    assert all(step["collector", "mask"] for step in buffer)


def test_numbers_of_numpy_are_numbers() -> None:
    with make_collector(frames_per_batch=np.int64(16), total_frames=np.int64(24)) as collector:
        assert [batch.shape for batch in collector] == [(2, 8), (1, 8)]


def test_flags_and_numbers_of_any_size_are_discrete_actions() -> None:
    for dtype in (torch.bool, torch.uint8, torch.int32):

        def policy(td: TensorDictBase, dtype: torch.dtype = dtype) -> TensorDictBase:
            return reply(len(td), action=torch.ones(len(td), dtype=dtype))

        with make_collector(policy=policy) as collector:
            assert next(iter(collector))["action"].dtype == dtype


class Coroutines:
    """An asynchronous environment, all of which share one action space."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(1000)

    async def reset(self, *, seed: int | None = None) -> Any:
        return np.zeros(1, np.float32), {}

    async def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_random_actions_of_an_asynchronous_environment_belong_to_its_seed() -> None:
    seen = []
    for num_envs in (1, 3):  # with others beside it, or without
        with make_collector(Coroutines, num_envs=num_envs, init_random_frames=8 * num_envs) as collector:
            batch = next(iter(collector))
            seen.append(batch["action"][batch["collector", "env"][:, 0] == 0][0].tolist())
    assert seen[0] == seen[1]


def test_a_recurrent_policy_whose_first_states_are_not_known_is_refused_with_the_way_out() -> None:
    policy = TensorDictModule(
        lambda seen, h: (seen.sum(-1).long(), h + 1), ["observation", "h"], ["action", ("next", "h")]
    )
    with pytest.raises(KeyError) as caught:
        make_collector(policy=policy, state_keys=["h"]).start()
    assert "let state_keys be a mapping" in caught.value.__notes__[0]
