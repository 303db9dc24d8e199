"""Servers that run already: with whatever transports they have, and with an end of their own."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer import (
    InferenceServer,
    MPTransport,
    NoFreeSlotError,
    PeerDiedError,
    ProcessInferenceServer,
    ProcessSlotTransport,
    ServerClosedError,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.collectors import AsyncBatchedCollector
from tests.collectors.worlds import AsyncWorld, World, assert_plain, make_policy, steps_by_env

needs_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def slots(rows: int, num_slots: int = 8) -> ProcessSlotTransport:
    request = TensorDict({"observation": torch.zeros(3)})
    reply = TensorDict({"action": torch.zeros((), dtype=torch.int64), "score": torch.zeros(())})
    return ProcessSlotTransport(request, reply, num_slots=num_slots, rows=rows)


def make_collector(server: Any, num_workers: int = 0, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"seed": 3, "num_envs": 5, "frames_per_batch": 64, "fragment_length": 8}
    return AsyncBatchedCollector(World, server=server, num_workers=num_workers, **{**settings, **options})


def make_transports(kind: str) -> Sequence[Any]:
    match kind:
        case "threads":
            return [ThreadingTransport()]
        case "slots of threads":
            return [SlotTransport(8)]
        case "pipes":
            return [MPTransport()]
        case "one row":
            return [slots(1)]
        case "two rows":
            return [slots(2)]
        case "rows enough":
            return [slots(8)]
        case _:
            return [ThreadingTransport(), slots(2)]


BETWEEN_PROCESSES = ["pipes", "one row", "two rows", "rows enough", "several"]


@pytest.mark.parametrize(
    ("num_workers", "kind"),
    [(0, kind) for kind in ["threads", "slots of threads", *BETWEEN_PROCESSES]] + [(2, k) for k in BETWEEN_PROCESSES],
)
def test_a_server_is_asked_through_whatever_transport_it_has(kind: str, num_workers: int) -> None:
    with InferenceServer(make_policy(), make_transports(kind)) as server:
        for _ in range(2):  # what the first collector had is free for the second
            with make_collector(server, num_workers) as collector:
                batches = [batch.clone() for batch in itertools.islice(collector, 6)]
            assert_plain(steps_by_env(batches), seed=3)
        assert server.is_alive, "it is left alone"


@pytest.mark.parametrize("transport", [ThreadingTransport, lambda: SlotTransport(8)])
def test_workers_need_a_transport_between_processes(transport: Any) -> None:
    server = InferenceServer(make_policy(), transport())
    with pytest.raises(ValueError, match="a transport between processes"):
        make_collector(server, 1)


def test_too_few_slots_are_told() -> None:
    for num_workers in (0, 1):
        with InferenceServer(make_policy(), slots(1, num_slots=2)) as server:
            collector = make_collector(server, num_workers)
            with pytest.raises(NoFreeSlotError, match="slots"):
                list(collector)


def test_the_weights_of_a_server_are_updated_through_the_collector() -> None:
    policy = make_policy()
    server = InferenceServer(make_policy(), ThreadingTransport(), policy_version=5)
    with server, make_collector(server) as collector:
        assert collector.policy_version == 5
        with pytest.raises(TypeError, match="without a policy"):
            collector.update_weights()
        collector.update_weights(policy)
        assert collector.policy_version == server.policy_version == 6
        assert next(batch for batch in collector if (batch["policy_version"] == 6).all()) is not None


def test_the_entry_of_versions_may_have_another_name() -> None:
    server = InferenceServer(make_policy(), ThreadingTransport(), policy_version=5, policy_version_key="of")
    with server, make_collector(server) as collector:
        batch = next(iter(collector))
        assert "of" not in batch
        assert (batch["policy_version"] == 5).all()


def test_a_server_whose_replies_tell_no_versions_is_refused() -> None:
    with (
        InferenceServer(make_policy(), ThreadingTransport(), policy_version_key=None) as server,
        pytest.raises(ValueError, match="must say their version"),
    ):
        make_collector(server).start()


def test_a_server_that_does_not_run_is_refused() -> None:
    server = InferenceServer(make_policy(), ThreadingTransport())
    with pytest.raises(RuntimeError, match="does not run"):
        make_collector(server).start()


@pytest.mark.parametrize("env", [World, AsyncWorld])
def test_environments_are_closed_where_the_start_fails(env: Any) -> None:
    closed = []

    class Closing(env):  # type: ignore[misc]
        def close(self) -> Any:
            closed.append(self)
            return super().close()

    policy = TensorDictModule(lambda observation: observation, in_keys=["observation"], out_keys=["value"])
    with pytest.raises(ValueError, match="returns no"):
        AsyncBatchedCollector([Closing, Closing], policy=policy).start()
    assert len(closed) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_server_that_is_shut_down_ends_the_iteration(num_workers: int) -> None:
    with InferenceServer(make_policy(), MPTransport()) as server:
        collector = make_collector(server, num_workers)
        with collector:
            batches = iter(collector)
            next(batches)
            server.shutdown()
            with pytest.raises(ServerClosedError):
                list(batches)


@needs_fork
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_process_that_is_killed_ends_the_iteration(num_workers: int) -> None:
    with ProcessInferenceServer(policy_factory=make_policy, transport=slots(8), ctx="fork") as server:
        collector = make_collector(server, num_workers)
        with collector:
            batches = map(TensorDictBase.clone, collector)
            found = [next(batches)]
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(PeerDiedError):
                found.extend(batches)
    assert_plain(steps_by_env(found), seed=3)


async def test_a_server_that_is_closed_ends_an_asynchronous_iteration() -> None:
    async with InferenceServer(make_policy(), ThreadingTransport()) as server, make_collector(server) as collector:
        batches = aiter(collector)
        await anext(batches)
        await server.aclose()
        with pytest.raises(ServerClosedError):
            _ = [batch async for batch in batches]
