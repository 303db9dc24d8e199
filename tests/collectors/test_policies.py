"""The policy: which weights computed which step, and what becomes of steps that are old, or that nobody reads."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from aioinfer import WeightSyncError
from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.testing import eventually
from aioinfer.weight_sync import SharedMemWeightSyncScheme
from tests.collectors.worlds import AsyncWorld, World, assert_plain, make_policy, steps_by_env
from tests.limits import HANG


def make_collector(makes: Any = World, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8}
    return AsyncBatchedCollector(makes, **{**settings, **options})


def marks(batch: TensorDictBase) -> list[int]:
    """By which of the weights that :func:`mark` has set each step's score was computed."""
    found: list[int] = ((batch["score"] - batch["observation"].sum(-1) * 1000) / 4e6).round().int().flatten().tolist()
    return found


def versions(batch: TensorDictBase) -> list[int]:
    found: list[int] = batch["policy_version"].flatten().tolist()
    return found


def mark(policy: TensorDictModule, number: int) -> None:
    policy.get_parameter("module.shift").fill_(number * 4e6)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_step_tells_the_weights_that_computed_it(num_workers: int) -> None:
    policy = make_policy()
    seen = set()
    with make_collector(policy=policy, num_envs=6, num_workers=num_workers) as collector:
        for number, batch in enumerate(itertools.islice(collector, 25)):
            assert marks(batch) == versions(batch)
            seen |= set(versions(batch))
            mark(policy, number + 1)
            collector.update_policy_weights_()
            assert collector.policy_version == collector.stats().policy_version == number + 1
    assert len(seen) > 10


def test_training_the_policy_changes_nothing_before_it_is_published() -> None:
    policy = make_policy()
    with make_collector(policy=policy, num_envs=4) as collector:
        mark(policy, 5)
        for batch in itertools.islice(collector, 5):
            assert not any(marks(batch))


def test_weights_may_be_given_in_any_form_and_with_a_version() -> None:
    trained = make_policy()
    mark(trained, 7)
    for weights in (trained, trained.state_dict()):
        with make_collector(policy=None, policy_factory=make_policy, num_envs=4, max_batches_ahead=1) as collector:
            collector.update_weights(weights, version=7)
            batch = next(batch for batch in collector if (batch["policy_version"] == 7).all())
            assert marks(batch) == versions(batch)
            with pytest.raises(WeightSyncError):
                collector.update_weights({"other": torch.zeros(1)})
            with pytest.raises(TypeError, match="give the weights"):
                collector.update_weights()


async def test_weights_can_be_updated_without_blocking_the_event_loop() -> None:
    policy = make_policy()
    async with make_collector(policy=policy, num_envs=4) as collector:
        mark(policy, 1)
        await collector.aupdate_weights()
        async for batch in collector:
            assert marks(batch) == versions(batch)
            if (batch["policy_version"] == 1).all():
                break


def test_a_trainer_can_send_weights_by_a_scheme() -> None:
    scheme = SharedMemWeightSyncScheme()
    policy = make_policy()
    scheme.init_on_sender(model=policy)
    with make_collector(num_envs=4, weight_sync=scheme) as collector:
        scheme.connect()
        mark(policy, 3)
        scheme.send()
        version = collector.policy_version
        for batch in collector:
            if (batch["policy_version"] == version).all():
                assert set(marks(batch)) == {3}
                break


class Ticketed(World):
    """Needs a ticket for each step."""

    def __init__(self, tickets: threading.Semaphore, entered: list[None]) -> None:
        super().__init__()
        self.tickets, self.entered = tickets, entered

    def step(self, action: Any) -> Any:
        self.entered.append(None)
        self.tickets.acquire()
        return super().step(action)


def test_fragments_that_are_older_than_the_lag_are_dropped_and_counted() -> None:
    tickets, entered = threading.Semaphore(3 * 8), list[None]()
    collector = make_collector(
        lambda: Ticketed(tickets, entered), frames_per_batch=8, max_policy_lag=1, max_batches_ahead=4
    )
    with collector:
        eventually(lambda: len(entered) == 25)  # three fragments are complete, the fourth has begun
        for _ in range(2):
            collector.update_weights()
        tickets.release(1000)
        found = [batch.clone() for batch in itertools.islice(collector, 5)]
        stats = collector.stats()
    assert all(version == 2 for batch in found for version in versions(batch))
    assert stats.dropped_fragments == 4
    assert stats.frames == 40
    assert stats.policy_lag.p99 == 0


def test_without_a_lag_old_steps_are_delivered_and_their_lag_is_told() -> None:
    tickets, entered = threading.Semaphore(3 * 8), list[None]()
    with make_collector(lambda: Ticketed(tickets, entered), frames_per_batch=8, max_batches_ahead=4) as collector:
        eventually(lambda: len(entered) == 25)
        for _ in range(2):
            collector.update_weights()
        tickets.release(1000)
        found = [batch.clone() for batch in itertools.islice(collector, 3)]
        stats = collector.stats()
    assert_plain(steps_by_env(found), seed=3)
    assert stats.dropped_fragments == 0
    assert stats.policy_lag.p50 == stats.policy_lag.p99 == 2


def test_the_oldest_batch_is_dropped_and_counted_where_nobody_reads() -> None:
    first_is_read = threading.Event()

    class Waiting(AsyncWorld):
        """Does no step behind the first batch before that was read: otherwise it might be dropped."""

        steps_left = 16

        async def step(self, action: Any) -> Any:
            if not self.steps_left and not first_is_read.is_set():
                await asyncio.to_thread(first_is_read.wait, HANG)
            self.steps_left = max(self.steps_left - 1, 0)
            return await super().step(action)

    with make_collector(Waiting, num_envs=4, overflow="drop_oldest", max_batches_ahead=1) as collector:
        batches = iter(collector)
        first = next(batches).clone()
        first_is_read.set()
        eventually(lambda: collector.stats().dropped_batches >= 3)
        found = [batch.clone() for batch in itertools.islice(batches, 4)]
        assert collector.stats().batches == 5
    assert_plain(steps_by_env([first]), seed=3)
    steps = steps_by_env(found)
    assert min(int(batch["collector", "step"].max()) for batch in found) >= 0
    assert all(len(of_env) == 64 for of_env in steps.values())
    assert not any(torch.equal(first["observation"], batch["observation"]) for batch in found)


def test_without_that_environments_wait_for_the_reader() -> None:
    steps = itertools.count()

    class Counting(World):
        def step(self, action: Any) -> Any:
            next(steps)
            return super().step(action)

    with make_collector(Counting, num_envs=8, max_batches_ahead=2) as collector:
        batches = iter(collector)
        next(batches)
        eventually(lambda: collector.stats().shares["reader"] > 0.5)
        assert next(steps) <= 64 * 5
        assert collector.stats().limited_by == "reader"
        assert collector.stats().dropped_batches == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_policy_that_raises_ends_the_iteration_with_what_it_raised(num_workers: int) -> None:
    class Failing(torch.nn.Module):
        def forward(self, observation: Tensor) -> Tensor:
            if observation[:, 0].max() > 5:
                raise ArithmeticError("this policy does not like large numbers")
            return torch.ones(len(observation), dtype=torch.int64)

    policy = TensorDictModule(Failing(), in_keys=["observation"], out_keys=["action"])
    collector = make_collector(policy=policy, num_envs=4, num_workers=num_workers)
    with collector, pytest.raises(ArithmeticError, match="does not like large numbers"):
        for _ in collector:
            pass


def test_a_policy_that_does_not_fit_is_refused_at_the_start() -> None:
    def answer(**entries: Any) -> Any:
        return lambda td: td.clone().update({key: make(len(td)) for key, make in entries.items()})

    for policy, message in (
        (answer(value=torch.zeros), 'returns no "action"'),
        (answer(action=lambda n: torch.zeros(n, 2)), "of shape"),
        (
            answer(action=lambda n: torch.zeros(n, dtype=torch.int64), next=torch.zeros),
            "a name that batches have for something else",
        ),
        (answer(action=lambda n: torch.zeros(n, dtype=torch.bfloat16)), "which has no place in a batch"),
    ):
        with pytest.raises(ValueError, match=message):
            make_collector(policy=policy).start()
