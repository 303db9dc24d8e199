"""File descriptors: none is free, children inherit them, and nobody reads what is written to them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport, WeightSyncError
from aioinfer.ipc.queue import Descriptor, DescriptorQueue
from aioinfer.ipc.selector import await_readable, wait_readable
from aioinfer.testing import eventually
from aioinfer.testing.inspection import channel_of, put_bytes, sender_of
from aioinfer.weight_sync import MultiProcessWeightSyncScheme
from aioinfer.weight_sync.channel import Ack, AckConnection, AckKind, Handshake
from tests.limits import HANG
from tests.weight_models import Counter
from tests.weights.workers import Scheme, following, linear, receiver, scheme, value_of

__all__ = ["scheme"]


@contextmanager
def none_free(but: int = 0) -> Iterator[None]:
    """Leave this process no descriptor, ``but`` some."""
    gc.collect()
    held: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    try:
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for _ in range(but):
            os.close(held.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts descriptors in /proc")


# -- none is free ------------------------------------------------------------------------------------------


@needs_proc
def test_a_message_whose_descriptor_found_no_place_says_so() -> None:
    queue = DescriptorQueue()
    queue.put(("here", Descriptor(queue.fileno())))
    queue.put(("there", Descriptor(queue.fileno())))
    with none_free():
        assert queue.get_nowait() == ("here", -1)
    word, descriptor = queue.get_nowait()
    assert word == "there"
    os.close(descriptor)
    queue.close()


@needs_proc
def test_a_trainer_without_descriptors_says_so_and_finds_the_worker_when_it_has_some(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    scheme.connect()  # by now there is memory that nobody reads
    target = linear(0)
    own = receiver(scheme, target)  # the trainer has not read its handshake yet
    end = threading.Event()

    def follow() -> None:
        while not end.is_set():
            try:
                own.receive(0.01)
            except OSError:  # it is without descriptors too
                end.wait(0.01)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(follow)
        try:
            with (
                none_free(),
                pytest.raises(WeightSyncError, match="worker 0 can't be listened to: Too many"),
            ):
                scheme.send()
            eventually(lambda: answered(scheme))
            for value in range(2, 5):
                scheme.send(linear(value))
                assert value_of(target) == value
        finally:
            end.set()
            running.result(HANG)
    own.shutdown()


def answered(scheme: Scheme) -> bool:
    return sender_of(scheme).connected([0]) == {0}


@needs_proc
def test_a_trainer_without_descriptors_for_memory_says_so_and_what_it_published_stays(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    with none_free(), pytest.raises(WeightSyncError, match=r"no memory for the weights: .*Too many open files"):
        scheme.send_async(nn.Linear(300, 300))
    own, target = scheme.for_worker(0), linear(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    assert value_of(target) == 1
    scheme.wait_async()
    own.shutdown()


@needs_proc
def test_a_worker_without_descriptors_refuses_new_memory_by_name(scheme: Scheme) -> None:
    scheme.init_on_sender(model=Counter(1))
    scheme.connect()
    own, target = scheme.for_worker(0), Counter(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    scheme.send_async(Counter(2, "2" * 100_000))  # more than the memory has room for that the worker knows
    with none_free():
        assert own.receive(0.0) is None
    with pytest.raises(WeightSyncError, match=r"worker 0 refused: OSError: .*Too many open files"):
        scheme.wait_async()
    assert value_of(target) == 1
    scheme.send_async(Counter(3, "3" * 100_000))
    assert own.receive(HANG) is not None
    assert value_of(target) == 3
    own.shutdown()


@needs_proc
async def test_a_server_without_descriptors_goes_on_following_when_it_has_some(
    scheme: Scheme, caplog: pytest.LogCaptureFixture
) -> None:
    served = TensorDictModule(linear(0), in_keys=["x"], out_keys=["y"])
    source = TensorDictModule(linear(1), in_keys=["x"], out_keys=["y"])
    scheme.init_on_sender(model=source)
    warned = asyncio.Event()

    def hear(record: logging.LogRecord) -> bool:
        if "can't receive weights" in record.getMessage():
            warned.set()
        return True

    caplog.handler.addFilter(hear)
    with caplog.at_level(logging.INFO, "aioinfer"):
        async with InferenceServer(served, ThreadingTransport(), weight_sync=scheme.for_worker(0)) as server:
            scheme.connect()
            await asyncio.to_thread(eventually, lambda: server.policy_version == 1)
            with none_free():
                sender_of(scheme).close()  # as the end of its process does: the server needs a new connection
                await asyncio.wait_for(warned.wait(), HANG)
                await asyncio.sleep(0.1)
            scheme.init_on_sender(model=source)
            scheme.connect()
            await asyncio.wait_for(scheme.asend(), HANG)
            assert server.policy_version in (2, 3)
            await asyncio.to_thread(eventually, lambda: server.stats().trainer_connected is True)
    assert caplog.text.count("can't receive weights") == 1


@needs_proc
async def test_waiting_takes_no_descriptor_and_any_number_may_wait_for_the_same() -> None:
    queue, other = DescriptorQueue(), DescriptorQueue()
    with none_free():
        wait_readable([queue, other], 0.0)
        waiting = [asyncio.ensure_future(await_readable([queue, other], None)) for _ in range(5)]
        timed = asyncio.ensure_future(await_readable([queue], 0.001))
        await asyncio.wait_for(timed, HANG)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert not waiting[1].done()
        other.put("news")
        done, _ = await asyncio.wait(waiting, timeout=HANG)
    assert done == set(waiting)
    assert waiting[0].cancelled()
    other.close()
    queue.close()


@pytest.mark.parametrize("timeout", [1e12, float("inf")])
def test_a_worker_may_wait_as_long_as_it_likes(scheme: Scheme, timeout: float) -> None:
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    own = receiver(scheme, linear(0))
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(own.receive, timeout)
        scheme.send()
        assert receiving.result(HANG) is not None
    own.shutdown()


# -- what is written, and nobody reads ---------------------------------------------------------------------


def test_a_connection_that_nobody_reads_is_closed_and_never_blocks() -> None:
    one, other = (AckConnection(end.detach()) for end in socket.socketpair())
    ack = Ack(AckKind.NACK, reason="x" * 2000)
    with ThreadPoolExecutor(1) as pool:
        list(pool.map(one.send_ack, [ack] * 10_000, timeout=HANG))
    heard: list[Ack] = []
    with pytest.raises(EOFError):
        other.receive(heard.append)
    assert len(heard) > 5
    assert set(heard) == {ack}


def refused_more_than(server: InferenceServer, count: int) -> bool:
    return server.stats().refused_updates > count


def test_a_long_refusal_is_cut_and_blocks_nobody() -> None:
    class Wordy(Counter):
        def set_extra_state(self, state: Any) -> None:
            raise ValueError("x" * 10**6)

    served = TensorDictModule(Wordy(0), in_keys=["x"], out_keys=["y"])
    scheme = MultiProcessWeightSyncScheme(num_workers=1, sync=False, timeout=HANG)
    scheme.init_on_sender(model=TensorDictModule(Counter(1), in_keys=["x"], out_keys=["y"]))
    with InferenceServer(served, ThreadingTransport(), weight_sync=scheme.for_worker(0)) as server:
        for count in range(4):
            scheme.send_async() if count else scheme.connect()
            eventually(partial(refused_more_than, server, count))
        with server.paused():  # the model thread is there
            pass
        with pytest.raises(WeightSyncError, match=r"ValueError: x+\.\.\.$") as refused:
            scheme.wait_async()
        assert len(str(refused.value)) < 2100
    scheme.shutdown()


def test_a_message_is_read_again_if_its_reader_was_interrupted() -> None:
    one, other = (AckConnection(end.detach()) for end in socket.socketpair())
    acks = [Ack(AckKind.ACK, (b"", number)) for number in range(3)]
    for ack in acks:
        one.send_ack(ack)
    heard: list[Ack] = []

    def note(ack: Ack) -> None:
        heard.append(ack)
        if len(heard) % 2:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            other.receive(note)
    assert heard == [acks[0], acks[0], acks[1], acks[1], acks[2]]
    other.receive(heard.append)
    one.close()
    with pytest.raises(EOFError):
        other.receive(heard.append)
    assert heard[-1] == acks[2]


# -- children ----------------------------------------------------------------------------------------------


def test_a_forked_child_holds_no_connection_though_some_end_meanwhile() -> None:
    connections = [tuple(AckConnection(end.detach()) for end in socket.socketpair()) for _ in range(20)]
    end = threading.Event()

    def churn() -> None:
        while not end.is_set():
            connections[0] = tuple(AckConnection(end.detach()) for end in socket.socketpair())

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        for _ in range(30):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(read)
                held = [end for pair in connections[1:] for end in pair if end.fileno() != -1]
                os.write(write, bytes([len(held)]))
                os._exit(0)
            os.close(write)
            assert os.read(read, 1) == b"\0"
            os.close(read)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        end.set()
        churning.join()
    connections[1][0].close()
    with pytest.raises(EOFError):
        connections[1][1].receive(print)


@needs_proc
def test_descriptors_come_back_when_a_scheme_and_its_workers_end(scheme: Scheme) -> None:
    before = 0
    for _ in range(5):
        again = type(scheme)(num_workers=2)
        again.init_on_sender(model=linear(1))
        with following(again, 0, linear(0)), following(again, 1, None):
            again.connect(timeout=HANG)
            for value in range(5):
                again.send(linear(value))
        again.shutdown()
        del again
        before = before or descriptors()
    assert descriptors() <= before


def test_rubbish_among_the_handshakes_is_ignored(scheme: Scheme) -> None:
    scheme.init_on_sender(model=linear(1))
    handshakes = channel_of(scheme).handshakes
    handshakes.put("somebody else")
    put_bytes(handshakes, b"rubbish")
    with following(scheme, 0, target := linear(0)):
        scheme.connect(timeout=HANG)
        assert value_of(target) == 1


@needs_proc
def test_what_was_looked_at_and_is_dropped_leaves_no_descriptor() -> None:
    gc.collect()  # what others have left may hold some
    queue = DescriptorQueue()
    before = descriptors()
    for _ in range(3):
        queue.put(Handshake(Descriptor(queue.fileno()), 1, 1))
        assert queue.peek() is queue.peek()
        queue.drop()
    queue.put(Handshake(Descriptor(queue.fileno()), 1, 1))
    assert queue.unread(take=False).connection == queue.unread(take=True).connection == -1
    assert descriptors() == before
    queue.put(Handshake(Descriptor(queue.fileno()), 1, 1))
    queue.peek()
    queue.close()
    assert descriptors() == before - 2


def test_a_queue_in_a_reference_cycle_is_closed_before_its_sockets_can_complain() -> None:
    queue = DescriptorQueue.__new__(DescriptorQueue)
    gc.collect(0)  # from now on it is of an older generation than its sockets, which are finalized first then
    DescriptorQueue.__init__(queue)
    cycle: list[Any] = [queue]
    cycle.append(cycle)
    reader = queue.fileno()
    del queue, cycle
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
