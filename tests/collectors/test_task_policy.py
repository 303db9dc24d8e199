"""The policy of asynchronous environments: one pass for all that ask in a tick, or a server where that takes long."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

import aioinfer.collectors.task_policy as module
from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.collectors.policy_caller import PolicyCaller
from aioinfer.collectors.policy_layout import PolicyLayout
from aioinfer.collectors.spaces import ArraySpec
from aioinfer.collectors.task_policy import TickPolicy
from tests.collectors.worlds import AsyncWorld, World, assert_plain, make_policy, steps_by_env
from tests.limits import HANG

LAYOUT = PolicyLayout(
    observation=(ArraySpec(("observation",), (), np.dtype(np.float32)),),
    sends_is_init=False,
    states=(),
    action=(ArraySpec(("action",), (), np.dtype(np.float32)),),
    outputs=(),
    version_key="version",
)


# -- within a tick -----------------------------------------------------------------------------------------


def tick_policy(compute: Callable[[TensorDictBase], Tensor], size: int = 8) -> TickPolicy:
    """One that is asked with the number of each row."""

    def reply(request: TensorDictBase) -> TensorDictBase:
        action = compute(request["observation"])
        return TensorDict({"action": action, "version": torch.full((len(request),), 7)}, request.batch_size)

    rows = np.arange(size, dtype=np.float32)
    return TickPolicy(reply, PolicyCaller(LAYOUT, [rows], np.zeros(size, np.bool_)))


async def ask(policy: TickPolicy, row: int) -> float:
    policy.begin(row)
    (actions,), index, version = await policy(row)
    assert version == 7
    return float(actions[index])


async def test_one_pass_answers_all_that_ask_in_a_tick() -> None:
    passes: list[list[float]] = []

    def compute(observation: Tensor) -> Tensor:
        passes.append(observation.tolist())
        return observation * 10

    policy = tick_policy(compute)
    assert await asyncio.gather(*[ask(policy, row) for row in (3, 1, 6)]) == [30, 10, 60]
    assert await asyncio.gather(*[ask(policy, row) for row in (1, 0)]) == [10, 0]
    assert passes == [[3, 1, 6], [1, 0]]


async def test_what_it_raises_is_raised_by_all_that_ask_in_that_tick_alone() -> None:
    def compute(observation: Tensor) -> Tensor:
        if (observation > 5).any():
            raise ArithmeticError("too large")
        return observation

    policy = tick_policy(compute)
    results = await asyncio.gather(*[ask(policy, row) for row in (2, 6)], return_exceptions=True)
    assert [type(result) for result in results] == [ArithmeticError] * 2
    assert await ask(policy, 2) == 2


async def test_a_task_that_is_cancelled_between_its_request_and_the_answer_changes_no_other() -> None:
    policy = tick_policy(lambda observation: observation * 10)
    tasks = [asyncio.create_task(ask(policy, row)) for row in (4, 2, 5)]
    asyncio.get_running_loop().call_soon(tasks[1].cancel)  # they run before, the pass behind it
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [results[0], results[2]] == [40, 50]
    assert isinstance(results[1], asyncio.CancelledError)
    assert await ask(policy, 2) == 20


# -- in a collector ----------------------------------------------------------------------------------------


def make_collector(makes: Sequence[Any], **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8}
    return AsyncBatchedCollector(makes, **{**settings, **options})


class Where(nn.Module):
    """Tells in which thread, and among how many rows, each action is computed."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ones = torch.ones(len(observation), dtype=torch.int64)
        return ones, ones * threading.get_ident(), ones * len(observation)


def where() -> TensorDictModule:
    return TensorDictModule(Where(), ["observation"], ["action", "thread", "rows"])


@pytest.fixture
def any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass may take as long as it takes on a machine with much else to do."""
    monkeypatch.setattr(module, "LONGEST_PASS", HANG)


async def threads(**options: Any) -> set[int]:
    async with make_collector([AsyncWorld] * 3, policy=where(), total_frames=128, **options) as collector:
        return {thread async for batch in collector for thread in batch["thread"].flatten().tolist()}


@pytest.mark.usefixtures("any_time")
async def test_a_copy_of_the_policy_runs_in_the_event_loop() -> None:
    assert await threads() == {threading.get_ident()}


@pytest.mark.parametrize("options", [{"local_inference": False}, {"groups_per_worker": 2}, {"in_lockstep": True}])
@pytest.mark.usefixtures("any_time")
async def test_a_server_computes_what_is_asked_for_in_its_terms(options: Any) -> None:
    assert threading.get_ident() not in await threads(**options)


@pytest.mark.parametrize("local_inference", [None, True])
async def test_a_server_computes_where_a_pass_would_block_the_loop(
    local_inference: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_PASS", 0.0)
    assert threading.get_ident() not in await threads(local_inference=local_inference)


class OneRow(nn.Module):
    """Takes no batches."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        if len(observation) > 1:
            raise ValueError("one at a time")
        scores = observation.sum(-1) * 1000
        return scores.long() % 4, scores


@pytest.mark.filterwarnings("ignore")
def test_a_server_computes_where_the_policy_can_not_take_all_rows_at_once() -> None:
    policy = TensorDictModule(OneRow(), ["observation"], ["action", "score"])
    with make_collector([AsyncWorld] * 3, policy=policy) as collector:
        assert_plain(steps_by_env([batch.clone() for batch in itertools.islice(collector, 4)]), seed=3)


@pytest.mark.usefixtures("any_time")
async def test_environments_that_wait_together_are_answered_together() -> None:
    arrived, everyone = 0, asyncio.Event()

    class Waiting(AsyncWorld):
        """Waits in its first step until all others have come as far."""

        first = True

        def __init__(self) -> None:
            super().__init__(ends=0.0)

        async def step(self, action: Any) -> Any:
            nonlocal arrived
            if self.first:
                self.first = False
                arrived += 1
                if arrived == 5:
                    everyone.set()
                await everyone.wait()
                await asyncio.sleep(0)  # the last one has not waited
            return self.world.step(action)

    async with make_collector([Waiting] * 5, policy=where(), total_frames=64) as collector:
        steps: Any = torch.cat([batch.reshape(-1).clone() async for batch in collector])
    second = steps[steps["collector", "step"] == 1]
    assert second["rows"].tolist() == [5] * 5


@pytest.mark.usefixtures("any_time")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_new_weights_are_those_of_a_version(num_workers: int) -> None:
    policy = make_policy()
    shift = policy.get_parameter("module.shift")
    seen = set[int]()
    with make_collector([AsyncWorld, World, AsyncWorld], policy=policy, num_workers=num_workers) as collector:
        for number, batch in enumerate(collector):
            versions = batch["policy_version"]
            marks = ((batch["score"] - batch["observation"].sum(-1) * 1000) / 4e6).round().long()
            assert torch.equal(marks, versions)
            seen |= set(versions[batch["collector", "env"] == 0].tolist())
            shift.fill_((number + 1) * 4e6)
            collector.update_policy_weights_()
            if len(seen) > 5:
                break


class Fails(nn.Module):
    """Raises once an episode has gone on for a while."""

    def forward(self, observation: Tensor) -> Tensor:
        if (observation[:, 0] > 100).any():
            raise ArithmeticError("it does not like large numbers")
        return torch.ones(len(observation), dtype=torch.int64)


@pytest.mark.usefixtures("any_time")
async def test_a_policy_that_raises_ends_the_iteration_with_what_it_raised() -> None:
    envs = [AsyncWorld(ends=0.0) for _ in range(3)]
    async with make_collector(envs, policy=TensorDictModule(Fails(), ["observation"], ["action"])) as collector:
        with pytest.raises(ArithmeticError, match="does not like large numbers"):
            async for _ in collector:
                pass
    assert all(env.closed for env in envs)


class Telling(nn.Module):
    """Calls what a test has put here, in each pass."""

    called: Callable[[], object] = staticmethod(lambda: None)

    def forward(self, observation: Tensor) -> Tensor:
        Telling.called()
        return torch.ones(len(observation), dtype=torch.int64)


@pytest.mark.usefixtures("any_time")
def test_a_collector_is_shut_down_while_the_policy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def shut_down() -> None:
        if next(calls) == 20:
            closing.start()

    collector = make_collector([AsyncWorld] * 3, policy=TensorDictModule(Telling(), ["observation"], ["action"]))
    closing = threading.Thread(target=collector.shutdown)
    collector.start()
    monkeypatch.setattr(Telling, "called", staticmethod(shut_down))
    for _ in collector:
        pass
    closing.join(HANG)
    assert not closing.is_alive()
