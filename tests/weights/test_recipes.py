"""Who gets which weights, in which order, and how many copies there are meanwhile."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from aioinfer.testing import eventually
from aioinfer.testing.inspection import sender_of
from aioinfer.weight_sync import (
    MultiProcessWeightSyncScheme,
    SharedMemWeightSyncScheme,
)
from tests.limits import HANG
from tests.weights.workers import Scheme, following, linear, scheme, value_of

__all__ = ["scheme"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs weights, a model, a context"),
        ({"params_map": {}}, "empty"),
        ({"model_id": "x" * 300, "model": linear(1)}, "256 characters, got 300"),
        ({"params_map": {0: linear(1)}, "model": linear(1)}, "can't be combined with weights or model"),
        ({"params_map": {0: linear(1)}, "devices": ["cpu"]}, "can't be combined with devices"),
        ({"params_map": {0: linear(1)}, "num_workers": 1}, "can't be combined with num_workers"),
        ({"model": linear(1), "weights": linear(1)}, "weights and model are two sources"),
        ({"model": linear(1), "devices": ["cpu"], "device_map_fn": lambda i, w: w}, "devices and device_map_fn both"),
        ({"model": linear(1), "device_map_fn": lambda i, w: w}, "needs num_workers"),
        ({"model": linear(1), "devices": ["cpu"], "num_workers": 2}, "1 devices for num_workers=2"),
        ({"model": linear(1), "num_workers": 0}, "at least 1"),
    ],
)
def test_ways_to_say_who_gets_what_do_not_mix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiProcessWeightSyncScheme().init_on_sender(**{"model_id": "policy", **arguments})


def test_other_strategies_and_numbers_of_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="tensordict"):
        MultiProcessWeightSyncScheme("pickle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        MultiProcessWeightSyncScheme(num_workers=0)
    with pytest.raises(ValueError, match="one weight set for all workers"):
        SharedMemWeightSyncScheme().init_on_sender(params_map={0: linear(1), 1: linear(1)})


def test_one_weight_set_for_all_may_be_said_worker_by_worker(scheme: Scheme) -> None:
    source = linear(1)
    scheme.init_on_sender(params_map={0: source, 1: source})
    targets = [linear(0), linear(0)]
    with following(scheme, 0, targets[0]), following(scheme, 1, targets[1]):
        scheme.connect(timeout=HANG)
        nn.init.constant_(source.weight, 2)
        scheme.send()
        assert [value_of(target) for target in targets] == [2, 2]
        assert len(sender_of(scheme).pool.refcounts) <= 2  # they read the same snapshot


def test_steps_out_of_order_are_errors(scheme: Scheme) -> None:
    for step in (scheme.send, scheme.wait_async, scheme.connect):
        with pytest.raises(RuntimeError, match=r"call init_on_sender\(\)"):
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

    scheme = MultiProcessWeightSyncScheme(timeout=HANG)
    trainer, worker = Context(3), Context(0)
    scheme.init_on_sender(model_id="agent.policy", context=trainer)
    scheme.connect()
    receiving = scheme.for_worker(1)
    receiving.init_on_receiver(model_id="agent.policy", context=worker)
    receiving.connect()
    assert value_of(worker.agent) == 3
    receiving.shutdown()

    class Collector:
        def get_model(self, model_id: str) -> nn.Module:
            assert model_id == "agent.policy"
            return collected

    collected = linear(0)
    scheme.send_async(worker_ids=0)
    receiving = scheme.for_worker(0)
    receiving.init_on_receiver(model_id="agent.policy", context=Collector())
    receiving.connect()
    assert value_of(collected) == 3
    receiving.shutdown()
    scheme.shutdown()


def test_each_worker_gets_its_own_weights() -> None:
    scheme = MultiProcessWeightSyncScheme(timeout=HANG)
    scheme.init_on_sender(params_map={0: linear(10), 1: linear(11)})
    mapped = MultiProcessWeightSyncScheme(timeout=HANG)
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
    scheme = MultiProcessWeightSyncScheme(timeout=HANG)
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
        eventually(lambda: len(sender_of(scheme).connected(range(4))) == 4)  # else the snapshots wait for them
        scheme.connect()
        for _ in range(3):
            scheme.send()
        assert alive == [0] * 16
        assert len(sender_of(scheme).pool.refcounts) <= 2
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
        scheme = MultiProcessWeightSyncScheme(strategy, timeout=HANG)  # type: ignore[arg-type]
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
