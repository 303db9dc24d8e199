"""Publishing in two steps, awaiting, and what is said on the queues."""

from __future__ import annotations

import asyncio
import os
import pickle
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tensordict import TensorDict
from torch import nn

from aioinfer import WeightSyncError
from aioinfer.testing.inspection import channel_of, sender_of
from aioinfer.weight_sync import (
    MPTransport,
    NoWeightSyncScheme,
    WeightSyncScheme,
)
from aioinfer.weight_sync import sender as sender_module
from tests.limits import HANG
from tests.weight_models import Counter
from tests.weights.workers import Scheme, following, linear, receiver, scheme, value_of

__all__ = ["scheme"]


def descriptor_of(message: Any) -> int:
    """Of the memory of a snapshot on a weight queue."""
    (_, ref), _ = message
    descriptor: int = ref.segment
    return descriptor


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
    own = receiver(scheme, target)
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
    own = receiver(scheme, target)
    sending = asyncio.ensure_future(scheme.asend(linear(2)))
    await asyncio.sleep(0.01)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert own.receive(HANG) is not None
    assert value_of(target) == 2
    own.shutdown()


class Unpicklable(Counter):
    """Its extra state can't be sent while it has a count of none."""

    def get_extra_state(self) -> Any:
        return {"count": self.count if self.count is not None else lambda: None}


def test_a_publication_that_fails_leaves_the_one_before_it_where_it_is(scheme: Scheme) -> None:
    source, target = Unpicklable(0), Counter(0)
    scheme.init_on_sender(model=source)
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target)
    scheme.connect()
    own.connect()
    scheme.send_async(Counter(42))
    source.count = None
    for _ in range(3):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            scheme.send_async()
    scheme.timeout = 0.1
    sender_of(scheme).timeout = 0.1
    with pytest.raises(WeightSyncError, match="worker 0 did not answer"):  # and not as if it had been applied
        scheme.wait_async()
    scheme.send_async(Counter(43))
    scheme.send_async(Counter(44))
    assert own.receive(HANG) is not None
    assert value_of(target) == 44
    assert own.receive(0.0) is None
    scheme.wait_async()
    own.shutdown()


def test_waiting_that_was_interrupted_or_failed_can_be_done_again(scheme: Scheme, monkeypatch: Any) -> None:
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    scheme.send_async()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sender_module, "wait_readable", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheme.wait_async()
    sender_of(scheme).timeout = 0.05
    with ThreadPoolExecutor(4) as pool:  # all wait for the same
        failures = [waiting.exception(HANG) for waiting in [pool.submit(scheme.wait_async) for _ in range(4)]]
    assert any(isinstance(failure, WeightSyncError) for failure in failures)
    assert all(isinstance(failure, WeightSyncError | None) for failure in failures)
    scheme.wait_async()  # nothing is under way


async def test_awaiting_that_was_cancelled_can_be_done_again(scheme: Scheme) -> None:
    target = linear(0)
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    scheme.send_async(linear(2))
    waiting = asyncio.ensure_future(scheme.await_async())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    again = asyncio.ensure_future(scheme.await_async())
    await asyncio.sleep(0)
    assert not again.done()
    with following(scheme, 0, target):
        await asyncio.wait_for(again, HANG)
        assert value_of(target) == 2


def test_a_worker_that_is_named_twice_is_an_error_and_nothing_is_kept(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1), num_workers=2)
    with following(scheme, 0, linear(0)), following(scheme, 1, linear(0)):
        scheme.connect(timeout=HANG)
        for _ in range(5):
            with pytest.raises(ValueError, match=r"names a worker twice: \[0, 1, 0\]"):
                scheme.send(worker_ids=[0, 1, 0])
        scheme.send(worker_ids=[1, 0])
        assert len(sender_of(scheme).pool.refcounts) <= 3


def test_weights_that_are_put_a_second_time_are_answered_and_not_read_again(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    receiver = scheme.open_receiver("policy", thread=0)
    updates = channel_of(scheme).updates
    message = updates.get_nowait()
    updates.put(message)
    first = receiver.receive_nowait()
    assert first is not None
    first.ack()
    updates.put(message)  # as for the successor of a worker, which has found them already
    os.close(descriptor_of(message))
    assert receiver.receive_nowait() is None
    scheme.send_async(linear(2))
    second = receiver.receive_nowait()
    assert second is not None
    second.ack()
    scheme.wait_async()
    receiver.close()


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


def test_whatever_a_worker_raises_is_acknowledged() -> None:
    class Leaving(Counter):
        def set_extra_state(self, state: Any) -> None:
            raise SystemExit(1)

    transport = MPTransport(queue.Queue(), queue.Queue())
    transport.send_weights_async(Counter(1))
    with pytest.raises(SystemExit):
        transport.receive_weights(model=Leaving(0))
    transport.weight_queue.put((("policy", {"weight": 3}), "update_weights"))
    with pytest.raises(TypeError):
        transport.receive_weights(model=linear(0))
    for number, message in ((1, "SystemExit: 1"), (2, '"weight" is of type int')):
        with pytest.raises(WeightSyncError, match=message):
            transport.wait_ack(number, timeout=0.0)


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
    channel_of(own).updates.put(("policy", "close"))
    with pytest.raises(ValueError, match='got "close"'):
        own.receive()
    scheme.send_async(linear(2))
    assert own.receive() is not None
    assert value_of(target) == 2
    own.shutdown()


def test_rubbish_costs_no_weights_that_came_before_it(scheme: Scheme) -> None:
    target = linear(0)
    scheme.init_on_sender(model=linear(1))
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target)
    scheme.connect()
    channel_of(own).updates.put(("policy", "close"))
    own.connect()
    assert value_of(target) == 1
    with pytest.raises(ValueError, match='got "close"'):
        own.receive(0.0)
    assert own.receive(0.0) is None
    own.shutdown()


def test_weights_that_a_worker_took_but_did_not_apply_are_left_for_the_next(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    first = scheme.open_receiver("policy", thread=0)
    assert first.receive_nowait() is not None
    first.close()
    sender_of(scheme).connected([0])  # what any call of the trainer looks at first
    second = scheme.open_receiver("policy", thread=0)
    update = second.receive_nowait()
    assert update is not None
    assert float(update.weights.tensors["weight"][0, 0]) == 1
    update.ack()
    second.close()
    sender_of(scheme).connected([0])
    third = scheme.open_receiver("policy", thread=0)
    assert third.receive_nowait() is None
    third.close()


def test_weights_of_another_model_are_refused(scheme: Scheme) -> None:
    scheme.init_on_sender(model_id="critic", model=linear(1))
    own = scheme.for_worker(0)
    own.timeout = 0.05
    own.init_on_receiver(model_id="policy", model=linear(0))
    scheme.connect()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(scheme.send)
        while not sending.done():
            with pytest.raises(TimeoutError):
                own.connect()
        with pytest.raises(WeightSyncError, match='weights of "critic", this worker serves "policy"'):
            sending.result()
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


def test_the_newest_stays_though_the_worker_reads_what_is_taken_back(scheme: Scheme, monkeypatch: Any) -> None:
    scheme.init_on_sender(model=linear(1))
    updates = channel_of(scheme).updates
    updates.put("somebody else's")
    scheme.connect()  # takes it back
    worker, unread = scheme.open_receiver("policy", thread=0), updates.unread
    assert sender_of(scheme).connected([0]) == {0}
    message = updates.get_nowait()
    updates.put("somebody else's")
    updates.put(message)
    worker.close()

    def overtaken(*, take: bool) -> Any:
        if take:
            updates.get_nowait()  # as the worker does: what was looked at is gone, and the newest is next
        return unread(take=take)

    with monkeypatch.context() as patch:
        patch.setattr(updates, "unread", overtaken)
        assert not sender_of(scheme).connected([0])  # it looks what the worker has left unread
    newest = updates.get_nowait()
    assert descriptor_of(newest) >= 0
    with pytest.raises(queue.Empty):
        updates.get_nowait()
    updates.put(newest)
    for left in (message, newest):
        os.close(descriptor_of(left))
    own, target = scheme.for_worker(0), linear(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    assert value_of(target) == 1
    own.shutdown()
