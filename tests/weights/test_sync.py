"""Schemes, with a trainer and its workers in one process: what is published, and that `send` always returns."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from aioinfer import WeightSyncError
from aioinfer.testing import eventually
from aioinfer.testing.inspection import sender_of
from aioinfer.weight_sync import (
    MultiProcessWeightSyncScheme,
)
from tests.limits import HANG
from tests.weight_models import SCHEMES, Counter
from tests.weights.workers import Scheme, following, linear, receiver, scheme, value_of

__all__ = ["scheme"]


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
        assert len(sender_of(scheme).pool.refcounts) <= 3
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
        assert len(sender_of(scheme).pool.refcounts) <= 2
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
        assert refused.value.failures.keys() == {0}
        assert pickle.loads(pickle.dumps(refused.value)).failures == refused.value.failures
        assert value_of(good) == 2
        assert torch.equal(small.weight, before)


def test_the_sender_hears_of_any_error_of_a_worker(scheme: Scheme) -> None:
    class Leaving(Counter):
        def set_extra_state(self, state: Any) -> None:
            raise SystemExit(state["count"])

    target = Leaving(0)
    scheme.init_on_sender(model=Counter(1))
    scheme.connect()
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target)
    with pytest.raises(SystemExit):
        own.connect()
    scheme.send_async()
    with pytest.raises(SystemExit):
        own.receive(HANG)
    with pytest.raises(WeightSyncError, match=r"worker 0 refused: SystemExit: 1"):
        scheme.wait_async()
    assert value_of(target) == 0
    own.shutdown()


def test_shutting_down_ends_a_send_that_waits(scheme: Scheme) -> None:
    scheme.timeout = HANG
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    own = receiver(scheme, linear(0))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(scheme.send, linear(2.0))
        time.sleep(0.1)  # it waits now, most likely
        started = time.monotonic()
        scheme.shutdown()
        with pytest.raises((WeightSyncError, RuntimeError)):
            sending.result(HANG)
        assert time.monotonic() - started < HANG / 2
    own.shutdown()


def test_a_worker_that_does_not_come_or_does_not_answer_is_named_at_the_timeout(scheme: Scheme) -> None:
    scheme.timeout = 0.2
    scheme.init_on_sender(model=linear(1))
    scheme.connect()  # waits for nobody
    with pytest.raises(WeightSyncError, match=r"worker 0 has not connected within 0\.2 s"):
        scheme.send()
    with pytest.raises(WeightSyncError, match=r"worker 0 has not connected within 0\.1 s"):
        scheme.connect(timeout=0.1)
    own = receiver(scheme, linear(0))
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


def test_an_answer_reaches_the_next_trainer_where_the_last_one_ends_meanwhile(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1))
    following_trainer = type(scheme).__new__(type(scheme))
    following_trainer.__setstate__(scheme.__getstate__())  # the same queues
    worker = scheme.for_worker(0).open_receiver("policy", thread=0)
    assert worker is not None
    try:
        scheme.connect()
        first = worker.receive(HANG)
        assert first is not None
        first.ack()
        following_trainer.init_on_sender(model=linear(2))
        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(following_trainer.connect, timeout=HANG)
            second = worker.receive(HANG)  # it is connected to the last trainer
            assert second is not None
            second.ack()
            scheme.shutdown()
            while not connecting.done():
                assert worker.receive(0.01) is None
            connecting.result()
    finally:
        worker.close()
        following_trainer.shutdown()


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
