"""What a server makes of requests: batches, replies, figures; and the fixed slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    DispatchReason,
    InferenceServer,
    InferenceTransport,
    InvalidRequestError,
    ServerClosedError,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.testing import double, request
from tests.limits import HANG
from tests.transports import TRANSPORTS


def test_a_lone_caller_waits_for_a_partial_batch_no_longer_than_the_timeout() -> None:
    with InferenceServer(double, ThreadingTransport(), min_batch_size=8, timeout=0.02) as server:
        assert server.client()(request(1), HANG)["action"][0] == 2
        assert dict(server.stats().batches) == {DispatchReason.TIMEOUT: 1}


def test_a_lone_caller_does_not_pay_the_batching_wait() -> None:
    with InferenceServer(double, ThreadingTransport(), timeout=10 * HANG) as server:
        assert server.client()(request(1), HANG)["action"][0] == 2
        assert dict(server.stats().batches) == {DispatchReason.IDLE: 1}


def test_a_partial_batch_leaves_when_enough_requests_are_there() -> None:
    with InferenceServer(double, ThreadingTransport(), min_batch_size=3, timeout=10 * HANG) as server:
        client = server.client()
        replies = [client.submit(request(value)) for value in range(3)]
        assert [reply.result(HANG)["action"][0].item() for reply in replies] == [0, 2, 4]
        assert server.stats().mean_batch_size == 3


def test_a_partial_batch_leaves_when_every_slot_waits() -> None:
    transport = SlotTransport(8)
    clients = [transport.client() for _ in range(3)]
    with InferenceServer(double, transport, min_batch_size=8, timeout=10 * HANG) as server:
        replies = [client.submit(request(value)) for value, client in enumerate(clients)]
        assert [reply.result(HANG)["action"][0].item() for reply in replies] == [0, 2, 4]
        assert dict(server.stats().batches) == {DispatchReason.ALL_WAITING: 1}


def test_a_collate_fn_sees_requests_of_any_layout() -> None:
    def pad(tds: list[TensorDictBase]) -> TensorDictBase:
        rows = [td["observation"] for td in tds]
        return TensorDict({"observation": nn.utils.rnn.pad_sequence(rows, batch_first=True)}, batch_size=[len(tds)])

    transport = ThreadingTransport()
    replies = [transport.client().submit(request(1, size=size)) for size in (2, 5, 3)]
    with InferenceServer(double, transport, collate_fn=pad) as server:
        assert [reply.result(HANG)["action"].sum().item() for reply in replies] == [4, 10, 6]
        assert server.stats().mean_batch_size == 3


def test_failed_batches_are_not_repeated_where_that_is_switched_off() -> None:
    passes: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        passes.append(td.batch_size[0])
        raise ArithmeticError("no")

    transport = ThreadingTransport()
    replies = [transport.client().submit(request(value)) for value in range(4)]
    with InferenceServer(model, transport, split_failed_batches=False):
        for reply in replies:
            with pytest.raises(ArithmeticError):
                reply.result(HANG)
    assert passes == [4]


def test_a_failing_batch_costs_two_extra_passes_for_each_request_at_most() -> None:
    passes: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        passes.append(td.batch_size[0])
        raise ArithmeticError("no")

    transport = ThreadingTransport()
    replies = [transport.client().submit(request(value)) for value in range(13)]
    with InferenceServer(model, transport):
        for reply in replies:
            with pytest.raises(ArithmeticError):
                reply.result(HANG)
    assert len(passes) <= 1 + 2 * 13


def test_replies_carry_the_out_keys_of_a_module_and_all_that_a_function_returns() -> None:
    module = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(module, ThreadingTransport()) as server:
        assert set(server.client()(request(1), HANG).keys()) == {"action", "policy_version"}
    with InferenceServer(module, ThreadingTransport(), out_keys=["action", "observation"]) as server:
        assert set(server.client()(request(1), HANG).keys()) == {"action", "observation", "policy_version"}
    with InferenceServer(lambda td: module(td), ThreadingTransport(), policy_version_key=None) as server:
        assert set(server.client()(request(1), HANG).keys()) == {"action", "observation"}


def test_no_graph_is_kept_and_the_mode_of_the_model_is_left_alone() -> None:
    module = TensorDictModule(
        nn.Sequential(nn.Linear(3, 2), nn.Dropout()), in_keys=["observation"], out_keys=["action"]
    )
    for training in (True, False):
        module.train(training)
        with InferenceServer(module, ThreadingTransport()) as server:
            action = server.client()(request(1), HANG)["action"]
        assert action.grad_fn is None
        assert not action.requires_grad
        assert not action.is_inference()
        assert module.training is training
    assert torch.is_grad_enabled()


def test_a_reply_is_not_the_callers_own_tensordict_even_if_the_model_returns_what_it_got() -> None:
    td = request(1).to("cpu")
    assert td.device is not None
    with InferenceServer(lambda batch: batch, ThreadingTransport()) as server:
        reply = server.client()(td, HANG)
    assert reply is not td
    reply["observation"].zero_()
    assert (td["observation"] == 1).all()


def test_a_spec_may_ask_for_requests_with_a_batch_dimension() -> None:
    spec = TensorDict({"observation": torch.zeros(4, 3)}, batch_size=[4])
    with InferenceServer(double, ThreadingTransport(), request_spec=spec) as server:
        client = server.client()
        reply = client(spec + 1, HANG)
        assert reply.batch_size == (4,)
        assert torch.equal(reply["action"], torch.full((4, 3), 2.0))
        with pytest.raises(InvalidRequestError, match=r"batch size \[\], requests to this server have \[4\]"):
            client(request(1))


def test_statistics_count_pending_requests_that_somebody_still_waits_for() -> None:
    transport = ThreadingTransport()
    server = InferenceServer(double, transport)
    futures = [transport.client().submit(request(value)) for value in range(3)]
    assert server.stats().pending == 3
    futures[1].cancel()
    assert server.stats().pending == 2
    server.shutdown()
    assert server.stats().pending == 0
    assert (server.stats().failed, server.stats().cancelled) == (2, 1)


def test_cancelled_requests_leave_room_in_a_bounded_queue() -> None:
    server = InferenceServer(double, ThreadingTransport(), max_pending=2)
    client = server.client()
    futures = [client.submit(request(value)) for value in range(2)]
    futures[0].cancel()
    late = client.submit(request(7))
    with server:
        assert late.result(HANG)["action"][0] == 14
        assert futures[1].result(HANG)["action"][0] == 2


def test_slots_are_fixed_in_number_and_take_one_request_at_a_time() -> None:
    transport = SlotTransport(2)
    client = transport.client()
    transport.async_client()
    with pytest.raises(RuntimeError, match="all 2 slots are taken"):
        transport.client()
    with pytest.raises(RuntimeError, match="all 2 slots are taken"):
        transport.async_client()
    with pytest.raises(NotImplementedError):
        transport.submit(request(1))
    future = client.submit(request(1))
    with pytest.raises(RuntimeError, match="slot 0 has a request under way"):
        client(request(2))
    future.cancel()
    assert not client.submit(request(3)).done()
    transport.close(ServerClosedError("end"))


@pytest.mark.parametrize("slots", [0, -1, 1.0, True, None])
def test_a_number_of_slots_that_is_none_is_refused(slots: Any) -> None:
    with pytest.raises(ValueError, match="num_slots"):
        SlotTransport(slots)


def test_a_preallocated_slot_may_be_written_to_while_its_request_waits() -> None:
    transport = SlotTransport(2, preallocate=True)
    clients = [transport.client() for _ in range(2)]
    first, other = request(1), request(5, size=4)
    replies = [client.submit(td) for client, td in zip(clients, (first, other), strict=True)]
    first["observation"].zero_()
    with InferenceServer(double, transport):
        assert replies[0].result(HANG)["action"].tolist() == [2, 2, 2]
        assert replies[1].result(HANG)["action"].tolist() == [10, 10, 10, 10]


@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if "slots" not in name and name != "joined"])
def test_the_five_verbs_work_by_themselves(transport: str) -> None:
    wire: InferenceTransport = TRANSPORTS[transport]()
    futures = [wire.submit(request(value)) for value in range(3)]
    wire.wait_for_work(HANG)
    inputs, callbacks = wire.drain(2)
    assert [td["observation"][0].item() for td in inputs] == [0, 1]
    wire.resolve(callbacks[0], request(7))
    wire.resolve_exception(callbacks[1], ArithmeticError("no"))
    assert futures[0].result(HANG)["observation"][0] == 7
    with pytest.raises(ArithmeticError, match="no"):
        futures[1].result(HANG)
    _, (last,) = wire.drain(8)
    wire.resolve(last, request(8))
    assert futures[2].result(HANG)["observation"][0] == 8
    wire.wait_for_work(0.001)
    assert wire.drain(8) == ([], [])
