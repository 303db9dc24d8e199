"""Schemes, with a trainer and its workers in one process: who gets what, when, and what is said of it."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from aioinfer import WeightSyncError
from aioinfer.testing import eventually
from aioinfer.weight_sync import (
    MPTransport,
    MultiProcessWeightSyncScheme,
    NoWeightSyncScheme,
    SharedMemWeightSyncScheme,
    WeightSyncScheme,
)
from tests.weight_models import SCHEMES

HANG = 20.0
Scheme = MultiProcessWeightSyncScheme | SharedMemWeightSyncScheme


def linear(value: float) -> nn.Linear:
    module = nn.Linear(2, 2, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def value_of(module: nn.Module) -> float:
    return float(next(module.parameters()).detach().flatten()[0])


@contextmanager
def following(scheme: Scheme, worker: int, module: nn.Module | None) -> Iterator[Scheme]:
    """A worker in a thread that applies what comes."""
    end = threading.Event()
    own = scheme.for_worker(worker)
    own.init_on_receiver(model_id="policy", model=module)

    def follow() -> None:
        step: Callable[[], Any] = own.connect
        while not end.is_set():
            try:
                step()
            except WeightSyncError:
                pass
            step = partial(own.receive, 0.02)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(follow)
        try:
            yield own
        finally:
            end.set()
            running.result(HANG)
            own.shutdown()


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Iterator[Scheme]:
    made = request.param(timeout=5.0)
    yield made
    made.shutdown()


# -- who gets what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs weights, a model, a context"),
        ({"params_map": {}}, "empty"),
        ({"params_map": {0: linear(1)}, "model": linear(1)}, "can't be mixed with weights or model"),
        ({"params_map": {0: linear(1)}, "devices": ["cpu"]}, "can't be mixed with devices"),
        ({"params_map": {0: linear(1)}, "num_workers": 1}, "can't be mixed with num_workers"),
        ({"model": linear(1), "weights": linear(1)}, "weights and model both"),
        ({"model": linear(1), "devices": ["cpu"], "device_map_fn": lambda i, w: w}, "two ways"),
        ({"model": linear(1), "device_map_fn": lambda i, w: w}, "needs num_workers"),
        ({"model": linear(1), "devices": ["cpu"], "num_workers": 2}, "1 devices for num_workers=2"),
        ({"model": linear(1), "num_workers": 0}, "at least 1"),
    ],
)
def test_ways_to_say_who_gets_what_do_not_mix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiProcessWeightSyncScheme().init_on_sender(model_id="policy", **arguments)


def test_other_strategies_and_numbers_of_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="tensordict"):
        MultiProcessWeightSyncScheme("pickle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        MultiProcessWeightSyncScheme(num_workers=0)
    with pytest.raises(ValueError, match="one weight set for all workers"):
        SharedMemWeightSyncScheme().init_on_sender(params_map={0: linear(1)})


def test_steps_out_of_order_are_errors(scheme: Scheme) -> None:
    for step in (scheme.send, scheme.wait_async, scheme.connect):
        with pytest.raises(RuntimeError, match="comes"):
            step()
    with pytest.raises(RuntimeError, match="init_on_receiver"):
        scheme.receive()
    with pytest.raises(ValueError, match="init_on_sender"):
        scheme.init_on_receiver(model_id="policy", worker_idx=0)
    scheme.init_on_sender(model=linear(1), num_workers=2)
    with pytest.raises(RuntimeError, match="connect"):
        scheme.send()
    with pytest.raises(ValueError, match=r"worker 2 is not registered; there are \[0, 1\]"):
        scheme.init_on_receiver(model_id="policy", worker_idx=2)
    with pytest.raises(ValueError, match="not for"):
        scheme.init_on_sender(model=linear(1), num_workers=3)
    scheme.connect()
    with pytest.raises(ValueError, match="unknown workers"):
        scheme.send(worker_ids=[1, 2])


def test_a_context_names_the_model_and_the_workers() -> None:
    class Context:
        def __init__(self, value: float) -> None:
            self.agent = nn.Sequential()
            self.agent.policy = linear(value)
            self.num_workers = 2
            self.worker_idx = 1

    scheme = MultiProcessWeightSyncScheme()
    trainer, worker = Context(3), Context(0)
    scheme.init_on_sender(model_id="agent.policy", context=trainer)
    scheme.connect()
    receiving = scheme.for_worker(1)
    receiving.init_on_receiver(model_id="agent.policy", context=worker)
    receiving.connect()
    assert value_of(worker.agent) == 3
    receiving.shutdown()
    scheme.shutdown()


def test_each_worker_gets_its_own_weights() -> None:
    scheme = MultiProcessWeightSyncScheme()
    scheme.init_on_sender(params_map={0: linear(10), 1: linear(11)})
    mapped = MultiProcessWeightSyncScheme()
    mapped.init_on_sender(model=linear(10), device_map_fn=lambda index, td: td + index, num_workers=2)
    for sender in (scheme, mapped):
        modules = linear(0), linear(0)
        with following(sender, 0, modules[0]), following(sender, 1, modules[1]):
            sender.connect()
            sender.send()
            assert [value_of(module) for module in modules] == [10, 11]
        sender.shutdown()


def test_copies_are_made_for_one_worker_after_the_other_and_die_before_the_next() -> None:
    """Of what the workers' weights are made of, one exists at a time; and one snapshot of it, in shared memory."""
    scheme = MultiProcessWeightSyncScheme()
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    def weights_for(index: int, weights: TensorDictBase) -> TensorDictBase:
        alive.append(sum(ref() is not None for ref in made))
        own = weights.clone()
        made.append(weakref.ref(own["weight"]))
        return own

    scheme.init_on_sender(model=linear(1), device_map_fn=weights_for, num_workers=4)
    with ExitStack() as stack:
        for worker in range(4):
            stack.enter_context(following(scheme, worker, linear(0)))
        scheme.connect()
        for _ in range(3):
            scheme.send()
        assert alive == [0] * 16
        assert scheme._sender is not None
        assert len(scheme._sender._shelf._stored) <= 2
    scheme.shutdown()


def test_devices_say_where_a_worker_without_a_model_gets_the_weights(scheme: Scheme) -> None:
    scheme.init_on_sender(weights={"a": torch.ones(2)}, devices=["cpu", "meta"])
    scheme.connect()
    for worker, device in enumerate(("cpu", "meta")):
        own = scheme.for_worker(worker)
        own.init_on_receiver(model_id="policy")
        own.connect()
        scheme.send(worker_ids=worker) if not scheme.sync else scheme.send_async(worker_ids=worker)
        weights = own.receive(HANG)
        assert isinstance(weights, TensorDict)
        assert weights["a"].device.type == device
        own.shutdown()


def test_a_worker_without_a_model_gets_copies_in_the_form_of_the_strategy() -> None:
    for strategy, kind in (("tensordict", TensorDict), ("state_dict", dict)):
        scheme = MultiProcessWeightSyncScheme(strategy)  # type: ignore[arg-type]
        scheme.init_on_sender(model=linear(1))
        scheme.connect()
        own = scheme.for_worker(0)
        own.init_on_receiver(model_id="policy")
        own.connect()
        scheme.send_async(linear(2))
        first = own.receive()
        assert isinstance(first, kind)
        scheme.send_async({"weight": torch.full((2, 2), 3.0)})
        second = own.receive()
        assert [float(weights["weight"][0, 0]) for weights in (first, second)] == [2, 3]  # type: ignore[index]
        own.shutdown()
        scheme.shutdown()


# -- what is published -------------------------------------------------------------------------------------


def test_only_what_was_sent_is_received(scheme: Scheme) -> None:
    source, target = linear(1), linear(0)
    scheme.init_on_sender(model=source)
    scheme.connect()
    nn.init.constant_(source.weight, -1)
    with following(scheme, 0, target):
        eventually(lambda: value_of(target) == 1)  # as of connect, not as of now
        for value in range(2, 20):
            nn.init.constant_(source.weight, value)
            scheme.send()
            nn.init.constant_(source.weight, -1)
            assert value_of(target) == value
    nn.init.constant_(source.weight, -2)
    assert value_of(target) == 19


def test_a_model_that_lies_in_shared_memory_is_copied_too(scheme: Scheme) -> None:
    source, target = linear(1).share_memory(), linear(0)
    scheme.init_on_sender(model=source)
    with following(scheme, 0, target):
        scheme.connect()
        scheme.send()
        nn.init.constant_(source.weight, -1)
        assert value_of(target) == 1


def test_weights_may_come_in_any_form(scheme: Scheme) -> None:
    target = linear(0)
    scheme.init_on_sender(model=linear(1))
    with following(scheme, 0, target):
        scheme.connect()
        forms: list[Any] = [linear(2), TensorDict.from_module(linear(3)), linear(4).state_dict()]
        for value, weights in enumerate(forms, 2):
            scheme.send(weights)
            assert value_of(target) == value


def test_a_slow_worker_skips_to_the_newest_and_nothing_piles_up() -> None:
    for kind in SCHEMES:
        scheme = kind(sync=False)
        scheme.init_on_sender(model=linear(0))
        scheme.connect()
        own, target = scheme.for_worker(0), linear(0)
        own.init_on_receiver(model_id="policy", model=target)
        own.connect()
        for value in range(500):
            scheme.send(linear(value))
        assert own.receive(HANG) is not None
        assert value_of(target) == 499
        assert own.receive(0.0) is None
        for value in range(500):
            scheme.send(linear(value))
            own.receive(0.0)
        assert scheme._sender is not None
        assert len(scheme._sender._shelf._stored) <= 3
        own.shutdown()
        scheme.shutdown()


def test_all_workers_read_one_snapshot(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1), num_workers=3)
    targets = [linear(0) for _ in range(3)]
    with ExitStack() as stack:
        for worker, target in enumerate(targets):
            stack.enter_context(following(scheme, worker, target))
        scheme.connect()
        for value in range(10):
            scheme.send(linear(value))
            assert [value_of(target) for target in targets] == [value] * 3
        assert scheme._sender is not None
        assert len(scheme._sender._shelf._stored) <= 2
        scheme.send(linear(50), worker_ids=[0, 2])
        assert [value_of(target) for target in targets] == [50, 9, 50]


# -- send always returns -----------------------------------------------------------------------------------


def test_a_worker_that_refuses_is_named_with_the_reason_and_the_others_apply(scheme: Scheme) -> None:
    small, good = nn.Linear(3, 3, bias=False), linear(0)
    before = small.weight.clone()
    scheme.init_on_sender(model=linear(1), num_workers=2)
    with following(scheme, 0, small), following(scheme, 1, good):
        scheme.sync = False
        scheme.connect()
        scheme.sync = True
        with pytest.raises(WeightSyncError, match=r'worker 0 refused.*"weight" has shape \[2, 2\]') as refused:
            scheme.send(linear(2))
        assert "worker 1" not in str(refused.value)
        assert value_of(good) == 2
        assert torch.equal(small.weight, before)


def test_a_worker_that_does_not_come_or_does_not_answer_is_named_at_the_timeout(scheme: Scheme) -> None:
    scheme.timeout = 0.2
    scheme.init_on_sender(model=linear(1))
    scheme.connect()  # waits for nobody
    with pytest.raises(WeightSyncError, match=r"worker 0 has not connected within 0\.2 s"):
        scheme.send()
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=linear(0))
    own.connect()
    with pytest.raises(WeightSyncError, match=r"worker 0 did not answer within 0\.2 s"):
        scheme.send()
    own.shutdown()


def test_a_late_answer_satisfies_nobody_else(scheme: Scheme) -> None:
    scheme.timeout = 0.2
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    own, target = scheme.for_worker(0), linear(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    with pytest.raises(WeightSyncError, match="did not answer"):
        scheme.send(linear(2))
    assert own.receive(HANG) is not None  # answers now, too late
    with pytest.raises(WeightSyncError, match="did not answer"):
        scheme.send(linear(3))
    own.shutdown()


def test_a_worker_that_has_shut_down_is_not_waited_for_unless_it_is_named(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1), num_workers=2)
    other = linear(0)
    with following(scheme, 1, other):
        with following(scheme, 0, linear(0)):
            scheme.connect()
            scheme.send()
        scheme.send(linear(2))
        assert value_of(other) == 2
        with pytest.raises(WeightSyncError, match="worker 0 has shut down"):
            scheme.send(linear(3), worker_ids=[0, 1])
        assert value_of(other) == 3
        successor = linear(0)
        with following(scheme, 0, successor):  # finds what was published meanwhile
            eventually(lambda: value_of(successor) == 3)
            scheme.send(linear(4))
            assert value_of(successor) == value_of(other) == 4


def test_a_trainer_that_begins_anew_can_publish_again(scheme: Scheme) -> None:
    target = linear(0)
    scheme.init_on_sender(model=linear(1))
    with following(scheme, 0, target):
        scheme.connect()
        for value in range(2, 6):
            scheme.init_on_sender(model=linear(value))  # the old one is forgotten, as if its process had ended
            scheme.connect()
            scheme.send()
            assert value_of(target) == value


def test_the_first_weights_wait_for_a_worker_that_comes_late(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(5))
    scheme.connect()
    own, target = scheme.for_worker(0), linear(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    assert value_of(target) == 5
    own.shutdown()


def test_a_worker_that_waits_in_vain_may_connect_again() -> None:
    scheme = MultiProcessWeightSyncScheme(num_workers=1, timeout=0.05)
    own, target = scheme.for_worker(0), linear(0)
    own.init_on_receiver(model_id="policy", model=target)
    with pytest.raises(TimeoutError, match="connect"):
        own.connect()
    scheme.init_on_sender(model=linear(5))
    scheme.connect()
    own.connect()
    assert value_of(target) == 5
    own.shutdown()
    scheme.shutdown()


# -- two steps, and awaiting -------------------------------------------------------------------------------


def test_publishing_and_waiting_can_be_two_steps(scheme: Scheme) -> None:
    source, target = linear(1), linear(0)
    scheme.init_on_sender(model=source)
    with following(scheme, 0, target):
        scheme.connect()
        scheme.send_async(linear(7))
        scheme.wait_async()
        assert value_of(target) == 7
        scheme.wait_async()  # nothing is under way


async def test_an_async_trainer_is_not_blocked(scheme: Scheme) -> None:
    source, target = linear(1), linear(0)
    scheme.init_on_sender(model=source)
    scheme.connect()
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    nn.init.constant_(source.weight, 2)
    sending = asyncio.ensure_future(scheme.asend())
    await asyncio.sleep(0)
    nn.init.constant_(source.weight, -1)  # the copy is taken
    assert not sending.done()
    assert own.receive(HANG) is not None
    await asyncio.wait_for(sending, HANG)
    assert value_of(target) == 2
    scheme.send_async(linear(3))
    waiting = asyncio.ensure_future(scheme.await_async())
    await asyncio.sleep(0)
    assert own.receive(HANG) is not None
    await asyncio.wait_for(waiting, HANG)
    own.shutdown()


async def test_sends_at_the_same_time_all_return(scheme: Scheme) -> None:
    target = linear(0)
    scheme.init_on_sender(model=linear(1))
    with following(scheme, 0, target):
        await asyncio.to_thread(scheme.connect)
        blocking = [asyncio.to_thread(scheme.send, linear(value)) for value in range(8)]
        awaiting = [scheme.asend(linear(value)) for value in range(8)]
        await asyncio.wait_for(asyncio.gather(*blocking, *awaiting), HANG)


async def test_a_send_that_is_cancelled_has_published(scheme: Scheme) -> None:
    target = linear(0)
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    sending = asyncio.ensure_future(scheme.asend(linear(2)))
    await asyncio.sleep(0.01)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert own.receive(HANG) is not None
    assert value_of(target) == 2
    own.shutdown()


# -- the wire ----------------------------------------------------------------------------------------------


def test_a_transport_carries_weights_over_any_queue() -> None:
    transport = MPTransport(queue.Queue(), queue.Queue())
    module, target = linear(2), linear(0)
    transport.send_weights_async(TensorDict.from_module(module), model_id="critic")
    nn.init.constant_(module.weight, -1)
    (model_id, weights), kind = transport.weight_queue.get()
    assert (model_id, kind) == ("critic", "update_weights")
    assert float(weights["weight"][0, 0]) == 2
    number = transport.send_weights_async(linear(3))
    assert transport.receive_weights(model=target) is not None
    with pytest.raises(TimeoutError):
        transport.wait_ack(number + 1, timeout=0.01)
    assert value_of(target) == 3
    assert transport.receive_weights(timeout=0.01) is None
    transport.send_weights_async(nn.Linear(3, 3))
    with pytest.raises(WeightSyncError):
        transport.receive_weights(model=target)
    with pytest.raises(WeightSyncError, match="don't fit"):
        transport.wait_ack(2)
    with pytest.raises(RuntimeError, match="ack_queue"):
        MPTransport(queue.Queue()).wait_ack()


@pytest.mark.parametrize("rubbish", [("policy", "close"), ((1, 2), "update_weights"), "hello", None])
def test_anything_else_on_the_queue_is_an_error_that_names_it(rubbish: Any) -> None:
    transport = MPTransport(queue.Queue())
    transport.weight_queue.put(rubbish)
    with pytest.raises(ValueError, match=str(rubbish[1] if rubbish == ("policy", "close") else "got")):
        transport.receive_weights(timeout=1)


def test_rubbish_on_the_queue_of_a_scheme_is_an_error_of_the_worker_and_no_more(scheme: Scheme) -> None:
    target = linear(0)
    scheme.init_on_sender(model=linear(1))
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target)
    scheme.connect()
    own.connect()
    own._channels[0].updates.put(("policy", "close"))
    with pytest.raises(ValueError, match='got "close"'):
        own.receive()
    scheme.send_async(linear(2))
    assert own.receive() is not None
    assert value_of(target) == 2
    own.shutdown()


def test_weights_of_another_model_are_refused(scheme: Scheme) -> None:
    scheme.init_on_sender(model_id="critic", model=linear(1))
    own = scheme.for_worker(0)
    own.timeout = 0.5
    own.init_on_receiver(model_id="policy", model=linear(0))
    scheme.connect()
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(own.connect)
        with pytest.raises(WeightSyncError, match='weights of "critic", this worker serves "policy"'):
            scheme.send()
        with pytest.raises(TimeoutError):
            connecting.result(HANG)
    own.shutdown()


def test_nothing_travels_by_the_scheme_that_does_nothing() -> None:
    scheme: WeightSyncScheme = NoWeightSyncScheme()
    scheme.init_on_sender(model_id="policy", model=linear(1))
    scheme.init_on_receiver(model_id="policy", model=linear(0))
    scheme.connect()
    scheme.send()
    scheme.send_async()
    scheme.wait_async()
    assert scheme.receive() is None
    scheme.shutdown()
