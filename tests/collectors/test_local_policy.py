"""Groups that run copies of the policy themselves: which do, with which weights, and what becomes of a torn read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import Tensor, nn

import aioinfer.collectors.local_policy as module
from aioinfer import InferenceServer, ThreadingTransport, WeightSyncError
from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.collectors.local_policy import LocalPolicy, PolicySource, PublishedWeights, make_source
from aioinfer.weight_sync.snapshot import clone_tensors
from tests.collectors.worlds import World, assert_plain, make_policy, steps_by_env
from tests.effort import Effort
from tests.limits import HANG


def make_collector(makes: Any = World, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"num_envs": 6, "seed": 3, "frames_per_batch": 64, "fragment_length": 8}
    return AsyncBatchedCollector(makes, **{**settings, **options})


# -- who runs the policy -----------------------------------------------------------------------------------


class Where(nn.Module):
    """Tells which process and which thread computes each action."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ones = torch.ones(len(observation), dtype=torch.int64)
        return ones, ones * os.getpid(), ones * threading.get_ident()


def where(of: nn.Module) -> TensorDictModule:
    return TensorDictModule(of, ["observation"], ["action", "process", "thread"])


def places(policy: Any, count: int = 8, **options: Any) -> tuple[set[int], set[int]]:
    """The processes and threads that have computed the actions of some batches."""
    processes, threads = set[int](), set[int]()
    with make_collector(policy=policy, **options) as collector:
        for batch in itertools.islice(collector, count):
            processes |= set(batch["process"].flatten().tolist())
            threads |= set(batch["thread"].flatten().tolist())
    return processes, threads


def test_each_worker_runs_a_copy_of_a_policy_that_it_can_run() -> None:
    processes, _ = places(where(Where()), num_workers=2)
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize("groups", [1, 3])
def test_each_group_of_this_process_runs_a_copy_too(groups: int) -> None:
    processes, threads = places(where(Where()), local_inference=True, groups_per_worker=groups)
    assert processes == {os.getpid()}
    assert len(threads) == groups


@pytest.mark.parametrize("options", [{"local_inference": False}, {"groups_per_worker": 2}, {"max_batch_size": 64}])
def test_a_server_computes_what_is_asked_for_in_its_terms(options: Any) -> None:
    assert places(where(Where()), num_workers=1, **options)[0] == {os.getpid()}


class Locked(Where):
    """Does not pickle."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Locked:
        return self


class OfOneProcess(Where):
    """Can be made in the process that has pickled it, and in no other."""

    def __reduce__(self) -> Any:
        return of_process, (os.getpid(),)


def of_process(pid: int) -> OfOneProcess:
    if pid != os.getpid():
        raise ImportError("this process has never heard of it")
    return OfOneProcess()


class Large(Where):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("much", torch.zeros(2**20 + 1))


def test_a_worker_runs_a_large_policy_where_that_is_asked_for() -> None:
    assert os.getpid() not in places(where(Large()), num_workers=1, local_inference=True)[0]


@pytest.mark.parametrize("inner", [Locked, OfOneProcess, Large])
def test_a_server_computes_where_a_worker_can_not_run_the_policy_or_should_not(inner: type[nn.Module]) -> None:
    assert places(where(inner()), num_workers=1)[0] == {os.getpid()}


class Stateful(Where):
    def get_extra_state(self) -> Any:
        return {}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("policy", "options", "why"),
    [
        (lambda td: td.set("action", torch.ones(len(td))), {}, "no nn.Module"),
        (where(Locked()), {"num_workers": 1}, "does not pickle"),
        (where(Stateful()), {}, "extra states"),
    ],
)
def test_where_it_can_not_be_local_and_must_that_is_said_at_the_start(policy: Any, options: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"local_inference=True is not for this policy: .*{why}"):
        make_collector(policy=policy, local_inference=True, **options).start()


@pytest.mark.parametrize("options", [{"in_lockstep": True}, {"max_batch_size": 8}])
def test_options_of_a_server_are_not_for_those_who_run_the_policy_themselves(options: Any) -> None:
    with pytest.raises(ValueError, match="server, in_lockstep and max_batch_size are not for local_inference=True"):
        make_collector(policy=make_policy(), local_inference=True, **options)
    with pytest.raises(TypeError, match="True, False or None"):
        make_collector(policy=make_policy(), local_inference="yes")


def test_a_server_that_was_given_is_asked() -> None:
    server = InferenceServer(where(Where()), ThreadingTransport())
    with pytest.raises(ValueError, match="are not for local_inference=True"):
        make_collector(server=server, local_inference=True)
    with server:
        assert len(places(None, server=server)[1]) == 1


class WithNoise(Where):
    def __init__(self) -> None:
        super().__init__()
        self.noise = np.random.default_rng(3)


def compiled() -> nn.Module:
    inner = Where()
    inner.compile(backend="eager")
    return inner


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Large, "bytes of weights"),
        (WithNoise, "random numbers of its own"),
        (compiled, "is compiled"),
    ],
)
def test_what_may_surprise_is_done_only_where_it_is_asked_for(make: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_source(make(), for_workers=False, only_if_sensible=True)
    make_source(make(), for_workers=False, only_if_sensible=False)


def test_functions_that_are_pickled_by_value_are_left_in_this_process() -> None:
    class Local(Where):
        pass

    assert places(where(Local()), num_workers=1)[0] == {os.getpid()}


# -- what it computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_several_groups_with_copies_live_through_a_plain_loop(num_workers: int) -> None:
    options = {"num_workers": num_workers, "groups_per_worker": 3, "local_inference": True}
    with make_collector(policy=make_policy(), num_envs=7, **options) as collector:
        assert_plain(steps_by_env([batch.clone() for batch in itertools.islice(collector, 10)]), seed=3)


class Writing(nn.Module):
    """Writes over what it is asked with."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        scores = observation.sum(-1) * 1000
        observation.fill_(-1.0)
        return scores.long() % 4, scores


def test_a_policy_that_writes_over_its_input_changes_no_observation() -> None:
    policy = TensorDictModule(Writing(), ["observation"], ["action", "score"])
    with make_collector(policy=policy) as collector:
        assert_plain(steps_by_env([batch.clone() for batch in itertools.islice(collector, 5)]), seed=3)


class Tied(nn.Module):
    """Its two layers have the same weights, and its buffers count for as much."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.register_buffer("offset", torch.zeros(3), persistent=False)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.other(self.one(observation)) + self.offset
        return scores.argmax(-1), scores


def test_what_was_published_last_is_what_a_copy_computes_with() -> None:
    policy = TensorDictModule(Tied(), ["observation"], ["action", "score"])
    source = source_of(policy)
    local = LocalPolicy(source, "version", None)
    request = TensorDict({"observation": torch.rand(5, 3)}, batch_size=[5])
    for version in (4, 9):
        with torch.no_grad():
            for tensor in (*policy.parameters(), *policy.buffers()):
                tensor.normal_()
        source.weights.publish(policy, version)
        for _ in range(2):
            reply = local(request.clone())
            expected = policy(request.clone())
            assert torch.equal(reply["score"], expected["score"])
            assert reply["version"].tolist() == [version] * 5


class Learned(nn.Module):
    """Returns a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.5))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            scores = observation.sum(-1) * 1000 * (self.scale + 0.5)
        return scores.long() % 4, self.scale.expand(len(observation))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_policy_may_return_what_requires_a_gradient(num_workers: int) -> None:
    policy = TensorDictModule(Learned(), ["observation"], ["action", "scale"])
    with make_collector(policy=policy, num_workers=num_workers) as collector:
        batch = next(iter(collector))
    assert (batch["scale"] == 0.5).all()


class Lazy(nn.Module):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        scores = td["observation"].sum(-1) * 1000
        reply = TensorDict({"action": scores.long() % 4, "score": scores}, td.batch_size)
        return LazyStackedTensorDict(*reply, stack_dim=0)


def test_a_policy_may_return_any_kind_of_tensordict() -> None:
    with make_collector(policy=Lazy(), local_inference=True) as collector:
        assert_plain(steps_by_env([batch.clone() for batch in itertools.islice(collector, 5)]), seed=3)


class Counting(nn.Module):
    """Counts its passes, and keeps its last input."""

    count: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("last", torch.zeros(1, 3), persistent=False)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.count += 1
        self.last = observation
        ones = torch.ones(len(observation), dtype=torch.int64)
        return ones, ones * self.count, ones * self.weight


def counting() -> TensorDictModule:
    return TensorDictModule(Counting(), ["observation"], ["action", "count", "weight"])


def test_updates_leave_buffers_alone_that_they_do_not_have() -> None:
    policy = counting()
    source = source_of(policy)
    local = LocalPolicy(source, "version", None)
    request = TensorDict({"observation": torch.rand(5, 3)}, batch_size=[5])
    for number in range(1, 6):
        policy.get_parameter("module.weight").data.fill_(number)
        source.weights.publish(policy, number, policy.state_dict().keys())
        for again in range(3):
            reply = local(request.clone())
            assert reply["weight"].tolist() == [number] * 5
            assert reply["count"].tolist() == [3 * (number - 1) + again + 1] * 5


def test_a_reader_that_has_missed_an_update_gets_what_it_had() -> None:
    policy = counting()
    weights = source_of(policy).weights
    policy.get_buffer("module.count").fill_(7)
    weights.publish(policy, 1)
    policy.get_buffer("module.count").fill_(8)
    weights.publish(policy, 2, {"module.weight"})
    assert int(weights.read(1).tensors["module.count"]) == 7
    assert weights.read(2).tensors.keys() == {"module.weight"}
    assert not weights.read(3).tensors


def update_again_and_again(collector: AsyncBatchedCollector) -> None:
    for _ in collector:
        collector.update_policy_weights_()


def test_weights_that_do_not_fit_a_copy_any_more_end_the_iteration() -> None:
    with (
        make_collector(policy=counting(), local_inference=True) as collector,
        pytest.raises(WeightSyncError, match=r'"module\.last" does not fit'),
    ):
        update_again_and_again(collector)


def test_a_mode_of_the_program_is_not_that_of_a_collector() -> None:
    """It is in force as the groups start, and ends then."""
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
    )
    for local in (True, False):
        with ExitStack() as stack:
            with set_interaction_type(InteractionType.RANDOM):
                collector = stack.enter_context(make_collector(policy=policy, local_inference=local))
                batches = iter(collector)
                next(batches)
            with set_interaction_type(InteractionType.DETERMINISTIC):
                for _ in range(4):
                    batch = next(batches)
                assert (batch["action"] != batch["logits"].argmax(-1)).any()


class KilledOnce(World):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, action: Any) -> Any:
        self.at -= 1
        if not self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def test_a_worker_that_is_started_again_has_the_weights_of_the_others() -> None:
    policy = make_policy()
    shift = policy.get_parameter("module.shift")
    seen = set[int]()
    with make_collector([lambda: KilledOnce(150), *[World] * 3], num_envs=None, policy=policy, num_workers=2) as made:
        for number, batch in enumerate(made):
            versions = batch["policy_version"]
            marks = ((batch["score"] - batch["observation"].sum(-1) * 1000) / 4e6).round().long()
            mask = batch["collector", "mask"]
            assert torch.equal(marks[mask], versions[mask])
            seen |= set(versions[mask].tolist())
            shift.fill_((number + 1) * 4e6)
            made.update_policy_weights_()
            if len(made.stats().restarts) and number > 40:
                break
    assert len(seen) > 10


# -- weights that are published ----------------------------------------------------------------------------


class Numbers(nn.Module):
    """Weights that all have one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("first", torch.full((3,), value))
        self.register_buffer("middle", torch.full((70_000,), value))
        self.register_buffer("last", torch.full((), value))


def values(tensors: dict[str, Tensor]) -> set[float]:
    return {value for tensor in tensors.values() for value in np.unique(tensor.numpy()).tolist()}


def source_of(policy: nn.Module, *, for_workers: bool = False) -> PolicySource:
    return make_source(policy, for_workers=for_workers, only_if_sensible=True)


@pytest.fixture
def source() -> PolicySource:
    return source_of(Numbers(0.0), for_workers=True)


@pytest.fixture
def weights(source: PolicySource) -> PublishedWeights:
    return source.weights


@pytest.mark.parametrize("overtaken", [1, 2, 3, 4])
def test_a_reader_that_is_overtaken_reads_again(
    overtaken: int, weights: PublishedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = itertools.count(1)

    def overtake(tensors: Any) -> dict[str, Tensor]:
        copies = clone_tensors({"first": tensors["first"]})
        if (now := next(newest)) <= 3:
            for number in range(overtaken):
                weights.publish(Numbers(10.0 * now + number), 10 * now + number)
        return copies | clone_tensors({name: tensors[name] for name in ("middle", "last")})

    monkeypatch.setattr(module, "clone_tensors", overtake)
    found = weights.read()
    assert values(found.tensors) == {float(found.version)}
    assert found.number <= weights.number


def publish_on(layout: bytes, descriptor: int, count: int) -> None:
    weights = PublishedWeights(layout, descriptor=os.dup(descriptor))
    for number in range(1, count):
        weights.publish(Numbers(float(number)), number)


def reading(weights: PublishedWeights) -> Iterator[int]:
    """The versions that are read, each of which is whole."""
    while True:
        found = weights.read()
        assert values(found.tensors) == {float(found.version)}
        yield found.version


def test_weights_are_whole_whoever_writes_them_meanwhile(source: PolicySource, effort: Effort) -> None:
    count = effort.times(300, stress=20_000)
    weights = source.weights
    assert weights.memory is not None
    assert source.pickled is not None
    fork = multiprocessing.get_context("fork")
    publisher = fork.Process(target=publish_on, args=(source.pickled.layout, weights.memory.fd, count))
    publisher.start()
    try:
        last = 0
        for version in reading(weights):
            assert version >= last
            last = version
            if version == count - 1:
                break
            assert publisher.exitcode in (None, 0)
    finally:
        publisher.kill()
        publisher.join(HANG)


def test_a_publisher_that_is_stopped_as_it_writes_keeps_nobody_from_reading(
    weights: PublishedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    weights.publish(Numbers(1.0), 1)
    with monkeypatch.context() as patched:
        patched.setattr(module, "copy_tensors", stop)
        with pytest.raises(KeyboardInterrupt):
            weights.publish(Numbers(2.0), 2)
    found = weights.read()
    assert (found.version, values(found.tensors)) == (1, {1.0})
    weights.publish(Numbers(3.0), 3)
    found = weights.read()
    assert (found.version, values(found.tensors)) == (3, {3.0})
