from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import nn

from aioinfer import (
    InferenceServer,
    ServerClosedError,
    ThreadingTransport,
)
from aioinfer.model_thread import PendingPolicy
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.transports.request import Request
from tests.limits import HANG
from tests.transports import TRANSPORTS, FiveVerbs


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": None}, TypeError),
        ({"transport": "auto"}, TypeError),
        ({"collate_fn": 3}, TypeError),
        ({"max_batch_size": 0}, ValueError),
        ({"min_batch_size": 65}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"max_pending": 0}, ValueError),
        ({"max_pending": 1.5}, ValueError),
        ({"request_spec": {"observation": torch.ones(3)}}, TypeError),
        ({"device": "nowhere"}, RuntimeError),
        ({"weight_sync": object()}, TypeError),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        InferenceServer(**dict[str, Any](model=double, transport=ThreadingTransport()) | arguments)


def test_the_constructor_starts_nothing() -> None:
    server = InferenceServer(double, ThreadingTransport())
    assert not server.is_alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("aioinfer")]


def test_a_server_that_runs_is_not_started_twice() -> None:
    with InferenceServer(double, ThreadingTransport()) as server:
        with pytest.raises(RuntimeError, match="runs already"):
            server.start()
        assert server.client()(request(1), HANG)["action"][0] == 2


def test_a_transport_serves_one_server_at_a_time() -> None:
    transport = ThreadingTransport()
    with InferenceServer(double, transport), pytest.raises(RuntimeError, match="has a running server"):
        InferenceServer(double, transport)
    with InferenceServer(double, transport) as server:
        assert server.client()(request(1), HANG)["action"][0] == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_whose_transport_went_to_another_leaves_it_alone(transport: str) -> None:
    wire = TRANSPORTS[transport]()
    first = InferenceServer(double, wire)
    with InferenceServer(double, wire) as second:
        first.shutdown()
        with pytest.raises(RuntimeError, match="has a running server"):
            first.start()
        assert second.client()(request(1), HANG)["action"][0] == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_shutdown_is_idempotent_and_refuses_also_without_a_start(transport: str) -> None:
    server = InferenceServer(double, TRANSPORTS[transport]())
    client = server.client()
    for _ in range(2):
        server.shutdown()
        with pytest.raises(ServerClosedError):
            client(request(1))
    with server:
        assert client(request(1), HANG)["action"][0] == 2
    server.shutdown()


def test_pending_requests_fail_at_once_while_the_model_is_busy() -> None:
    model = GatedModel()
    server = InferenceServer(model, ThreadingTransport()).start()
    client = server.client()
    first = client.submit(request(0))
    assert model.entered.wait(HANG)
    second = client.submit(request(1))
    closing = threading.Thread(target=server.shutdown, args=(HANG,))
    closing.start()
    with pytest.raises(ServerClosedError):
        second.result(HANG)
    model.open()
    closing.join()
    assert first.result(0)["action"][0] == 0


class Broken(FiveVerbs):
    def drain(self, max_items: int) -> Any:
        inputs, callbacks = super().drain(max_items)
        if inputs:
            raise OSError("the wire broke")
        return inputs, callbacks


def test_a_worker_that_dies_ends_every_request_and_says_why() -> None:
    server = InferenceServer(double, Broken())
    client = server.client()
    pending = client.submit(request(1))
    with server:
        with pytest.raises(ServerClosedError, match="died of OSError: the wire broke"):
            pending.result(HANG)
        eventually(lambda: not server.is_alive)
        with pytest.raises(ServerClosedError, match="the wire broke") as caught:
            client(request(1))
        assert caught.value.__cause__ is not None


def test_a_model_that_cannot_move_to_its_device_fails_the_start() -> None:
    class Stuck(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("stuck")

    server = InferenceServer(Stuck(1, 1), ThreadingTransport(), device="cpu")
    with pytest.raises(ValueError, match="stuck"):
        server.start()
    assert not server.is_alive


def test_the_server_may_be_shut_down_from_its_own_thread() -> None:
    server = InferenceServer(double, ThreadingTransport()).start()
    done = threading.Event()

    def close(_: object) -> None:
        server.shutdown()
        done.set()

    server.client().submit(request(1)).add_done_callback(close)
    assert done.wait(HANG)
    eventually(lambda: not server.is_alive)
    server.shutdown()


@pytest.mark.parametrize("pending", [None, "keep", "wait", "reject"])
def test_what_waits_for_a_pass_to_end_is_refused_inside_one(pending: PendingPolicy | None) -> None:
    class Impatient(nn.Module):
        def forward(self, td: TensorDictBase) -> TensorDictBase:
            if td["observation"][0, 0] < 0:
                return double(td)
            if pending is None:
                server.update_weights(self)
            with server.paused(pending or "keep"):
                return double(td)

    server = InferenceServer(Impatient(), ThreadingTransport())
    with server:
        client = server.client()
        with pytest.raises(RuntimeError, match="can't wait for a pass to end"):
            client(request(1), HANG)
        assert is_double(client(request(-1), HANG), -1)


def test_shutdown_from_many_threads_at_once() -> None:
    server = InferenceServer(double, ThreadingTransport()).start()
    threads = [threading.Thread(target=server.shutdown) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not server.is_alive


def test_requests_that_were_just_taken_are_not_forgotten_by_a_shutdown_that_does_not_wait() -> None:
    transport = ThreadingTransport()
    server = InferenceServer(double, transport)
    get_batch, taken, go_on = transport.queue.get_batch, threading.Event(), threading.Event()

    def get_batch_and_stand_still(max_items: int) -> list[Request]:
        requests = get_batch(max_items)
        taken.set()
        assert go_on.wait(HANG)
        return requests

    transport.queue.get_batch = get_batch_and_stand_still  # type: ignore[assignment, method-assign]
    server.start()
    reply = server.client().submit(request(1))
    assert taken.wait(HANG)
    server.shutdown(timeout=0)
    go_on.set()
    with pytest.raises(ServerClosedError):
        reply.result(HANG)
    eventually(lambda: not server.is_alive)


@pytest.mark.parametrize("turn", range(20))
def test_shutdown_at_any_moment_under_load_leaves_nobody_waiting(turn: int) -> None:
    server = InferenceServer(double, ThreadingTransport(), max_batch_size=4).start()
    outcomes: list[str] = []

    def call() -> None:
        client = server.client()
        try:
            while True:
                client(request(1), HANG)
        except ServerClosedError:
            outcomes.append("closed")

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: server.stats().ok > 10 * turn)
    server.shutdown()
    for thread in threads:
        thread.join()
    assert outcomes == ["closed"] * 8


async def test_a_hosted_server_may_be_closed_from_another_event_loop() -> None:
    server = InferenceServer(double, ThreadingTransport()).start()
    reply = await server.async_client()(request(1))
    assert reply["action"][0] == 2
    await server.aclose()
    assert not server.is_alive
    await asyncio.to_thread(server.shutdown)
