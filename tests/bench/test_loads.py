"""The loads that the benchmark makes, alone and beside a trainer."""

import asyncio
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from tensordict import TensorDict
from torch import Tensor

from aioinfer.bench import load_generators as load
from aioinfer.bench import measure, requests, runner, systems, weights, workloads
from aioinfer.bench.models import Policy, step_environments
from aioinfer.bench.peer_process import PeerProcess, Pipe
from aioinfer.bench.workloads import WORKLOADS, RequestKind, System, WeightSet
from tests.bench.parts import BY_NAME, job

# -- the loads -----------------------------------------------------------------------------------------


def test_an_open_loop_has_the_same_schedule_for_the_same_seed() -> None:
    schedule = load.arrival_times(4000.0, 2.0, seed=3)
    assert schedule == load.arrival_times(4000.0, 2.0, seed=3) != load.arrival_times(4000.0, 2.0, seed=4)
    assert schedule == sorted(schedule)
    assert 0 < schedule[0] < schedule[-1] < 2.0
    assert len(schedule) == pytest.approx(8000, rel=0.1)


async def test_an_open_loop_answers_every_request_and_leaves_the_warm_up_out() -> None:
    submitted = []

    def submit(request: object) -> asyncio.Future[object]:
        submitted.append(request)
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, request)
        return future

    caller = systems.TaskCaller(submit, submit)
    latencies = await load.open_loop_latencies(caller, "td", [0.0, 0.001, 0.002, 0.003], warm_up=0.002)
    assert len(submitted) == 4
    assert len(latencies) == 2


def test_an_error_of_a_thread_reaches_the_measurement() -> None:
    def fail(_: object) -> None:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError, match="refused"):
        load.thread_rate([fail], [None], 0.0, 0.0)


async def test_an_error_of_a_task_reaches_the_measurement() -> None:
    def fail(_: object) -> asyncio.Future[object]:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError, match="refused"):
        await load.task_rate([systems.TaskCaller(fail, fail)], [None], 0.0, 10.0)


async def test_a_rate_is_measured_until_there_is_a_reply() -> None:
    async def call(request: float) -> None:
        await asyncio.sleep(request)

    caller = systems.TaskCaller(call, call)  # type: ignore[arg-type]
    assert load.thread_rate([time.sleep], [0.05], 0.0, 0.001) > 0
    assert await load.task_rate([caller], [0.05], 0.0, 0.001) > 0


def test_acts_that_take_turns_are_timed_apart_without_the_warm_up() -> None:
    acts: list[str] = []
    times = load.time_by_turns({"send": lambda: acts.append("send"), "copy": lambda: acts.append("copy")}, 0.0, 0.0)
    assert acts == ["send", "copy"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"send": 2, "copy": 2}


@pytest.mark.parametrize(
    ("begun", "ended", "gap"), [(1.5, 2.5, 1.0), (3.5, 3.6, 3.0), (6.5, 9.0, 2.0), (0.0, 99.0, 3.0)]
)
def test_the_longest_gap_lies_at_least_partly_inside_the_update(begun: float, ended: float, gap: float) -> None:
    assert load.longest_gap([1.0, 2.0, 3.0, 6.0, 7.0, 9.0], begun, ended) == gap


async def test_gaps_are_measured_with_and_without_an_update() -> None:
    passes = [0.0]  # of an earlier round

    async def call(request: object) -> None:
        await asyncio.sleep(0)
        passes.append(time.perf_counter())

    async def update() -> tuple[float, float]:
        begun = time.perf_counter()
        await asyncio.sleep(0.01)
        return begun, time.perf_counter()

    caller = systems.TaskCaller(call, call)  # type: ignore[arg-type]
    started = time.perf_counter()
    with_one, without = await load.update_gaps([caller], [None], passes, update)
    assert 0 < with_one < time.perf_counter() - started
    assert 0 < without < time.perf_counter() - started


def test_each_latency_of_a_timed_call_is_taken_once() -> None:
    timed = load.TimedCall(str.upper, think_time=1e-9)
    assert [timed("a"), timed("b")] == ["A", "B"]
    assert len(timed.take()) == 2
    assert timed.take() == []
    timed("c")
    assert len(timed.take()) == 1


def test_a_reply_that_is_none_is_not_measured() -> None:
    policy = Policy("tiny")
    with pytest.raises(RuntimeError, match=r"shape \[3, 2\], expected \[2\]"):
        policy.check(policy.module(policy.request(3)))
    with pytest.raises(RuntimeError, match=r"shape \[2\], expected \[3, 2\]"):
        policy.check(policy.module(policy.request()), 3)


@pytest.mark.parametrize("way", ["threading", "slots"])
@pytest.mark.parametrize("name", ["tasks-tiny", "tasks-tiny-fresh", "threads-tiny-named", "one-thread", "one-task"])
def test_ours_is_measured_on_every_transport(name: str, way: str) -> None:
    figures = measure.measure(job(name, way=way))
    assert figures[BY_NAME[name].metrics[0].figure] > 0


class Client:
    """Notes how it is called, and replies."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, td: TensorDict | None = None, **named: Any) -> TensorDict:
        assert (td is None) is (set(named) == {"observation"})
        self.calls.append(named["observation"] if td is None else td)
        return Policy("tiny").reply()

    async def call(self, td: TensorDict | None = None, **named: Any) -> TensorDict:
        return self(td, **named)


async def test_a_caller_makes_each_request_as_its_kind_says() -> None:
    policy, client = Policy("tiny"), Client()
    example = policy.request()
    for kind in RequestKind:
        prepared = requests.prepare(kind, example)
        policy.check(requests.blocking(kind, client)(prepared))
        policy.check(await requests.awaiting(kind, client.call)(prepared))
    reused, again, fresh, afresh, array, _, tensor, _ = client.calls
    assert reused is again is example
    assert fresh is not afresh
    assert fresh["observation"] is afresh["observation"] is tensor is example["observation"]
    assert isinstance(array, np.ndarray)
    assert array.tolist() == tensor.tolist()


def test_kinds_of_requests_take_turns_with_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()

    @contextmanager
    def serve_threads(*_: object) -> Iterator[list[Client]]:
        yield [client]

    monkeypatch.setattr(systems, "serve_threads", serve_threads)
    monkeypatch.setattr(workloads, "WORKLOADS", [replace(BY_NAME["threads-tiny-named"], callers=1)])
    rates = measure.measure(job("threads-tiny-named"))
    assert set(rates) == {"array rate", "tensor rate", "reused rate"}
    assert min(rates.values()) > 0
    turns = [kind for kind, _ in groupby(type(sent) for sent in client.calls)]
    assert turns == [np.ndarray, Tensor, TensorDict, Tensor, np.ndarray, Tensor, TensorDict, Tensor, np.ndarray]


def test_environments_that_step_have_new_observations() -> None:
    request = Policy("mlp").request(4)
    before = request["observation"].clone()
    step_environments(request, Policy("mlp").reply(4))
    after = request["observation"]
    assert after.shape == before.shape
    assert not after.equal(before)


@pytest.mark.parametrize(("name", "way"), [("rows-1024", "threading"), ("rows-1024-policy", "policy module")])
def test_requests_of_several_rows_are_measured(name: str, way: str) -> None:
    assert set(measure.measure(job(name, way=way))) == {"p50", "p99", "count", "pass"}


def test_ours_and_the_bare_model_are_measured_where_there_is_one_way() -> None:
    assert set(measure.measure(job("open-loop"))) == {"p50", "p99", "count"}
    assert measure.measure(job("bare-tiny-64", System.BARE, "none"))["rate"] > 0


def test_what_all_callers_in_one_batch_would_get_counts_what_they_think_between() -> None:
    assert set(measure.measure(job("slow-processes-8", System.BARE, "none"))) == {"rate", "p50", "p99", "count"}
    thinking = BY_NAME["slow-processes-8-thinking"]
    (rate,) = measure.measure(job(thinking.name, System.BARE, "none")).values()
    assert 0 < rate < thinking.callers / (0.01 + thinking.think_time)


# -- with a trainer ------------------------------------------------------------------------------------


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [
        workload if workload.weights is None else replace(workload, weights=WeightSet(1_000_000, 50))
        for workload in WORKLOADS
    ]
    monkeypatch.setattr(workloads, "WORKLOADS", small)


@pytest.mark.usefixtures("spawned_in_a_moment")
@pytest.mark.parametrize(
    ("name", "way", "figures"),
    [
        ("weights-420mb", "queues", {"p50", "p99", "count", "memcpy"}),
        ("weights-420mb-shared", "shared memory", {"p50", "p99", "count", "memcpy"}),
        ("weights-publishing", "queues", {"rate", "quiet rate", "updates"}),
        ("weights-gap-swap", "queues", {"gap", "quiet gap", "memcpy", "count"}),
    ],
)
def test_weights_are_measured_between_two_processes(
    monkeypatch: pytest.MonkeyPatch, name: str, way: str, figures: set[str]
) -> None:
    shrink(monkeypatch)
    found = measure.measure(job(name, way=way, seconds=0.2))
    assert set(found) == figures
    assert min(found.values()) > 0
    assert gc.get_freeze_count() == 0


def test_a_server_that_does_not_serve_what_was_sent_is_not_measured() -> None:
    class Stale:
        def ask(self, observation: list[float]) -> list[float]:
            return [0.0, 0.0]

    with pytest.raises(RuntimeError, match=r"the server answered \[0.0, 0.0\] after send\(\), the model "):
        weights.check_served_weights(Policy("tiny"), lambda: None, Stale())  # type: ignore[arg-type]


def test_a_trainer_that_falls_behind_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> "Idle":
            return self

        def __exit__(self, *_: object) -> None: ...

        def send(self, message: str) -> None: ...

        def answer(self) -> int:
            return 0

    shrink(monkeypatch)
    monkeypatch.setattr(weights, "PeerProcess", Idle)
    with pytest.raises(RuntimeError, match=r"0\.0 updates/s were published instead of 10"):
        measure.measure(job("weights-publishing", way="queues"))


def fail(pipe: Pipe) -> None:
    raise ConnectionError("refused")


def die(pipe: Pipe) -> None:
    os._exit(3)


@pytest.mark.usefixtures("spawned_in_a_moment")
def test_what_goes_wrong_in_the_other_process_is_told_in_this_one() -> None:
    with pytest.raises(RuntimeError, match=r"the other process failed: ConnectionError: refused"):
        PeerProcess(fail)
    with pytest.raises(RuntimeError, match="the other process died"):
        PeerProcess(die)


@pytest.mark.skipif(find_spec("torchrl") is None, reason="torchrl is not installed")
def test_weights_of_torchrl_are_measured_too() -> None:
    (outcome,) = runner.measure_in_turn([job("weights-1mb-8", System.TORCHRL, "queues")])
    assert not isinstance(outcome, runner.MeasurementError), str(outcome)
    assert outcome["p50"] > 0


@pytest.mark.skipif(find_spec("torchrl") is None, reason="torchrl is not installed")
def test_torchrl_is_measured_in_a_process_of_its_own() -> None:
    jobs = [job("tasks-tiny", System.TORCHRL, "threading"), job("tasks-tiny-fresh", System.STACK, "slots")]
    for outcome in runner.measure_in_turn([*jobs, job("threads-tiny", System.TORCHRL, "slots")]):
        assert not isinstance(outcome, runner.MeasurementError)
        assert outcome["rate"] > 0
