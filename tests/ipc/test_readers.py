"""Threads that share a connection: one reads for all of them, and none waits for another one's reply."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from tensordict import TensorDictBase

from aioinfer import InferenceServer, MPTransport
from aioinfer.testing import double, eventually, request
from aioinfer.testing.callers import expect_error, is_double
from aioinfer.transports.ipc import connection as connection_module
from tests.limits import HANG
from tests.transports import process_slots

MAKES: list[Any] = [process_slots, MPTransport]
SOON = HANG / 5


class Passing:
    """Threads with clients of one connection, and a server whose model lets each value pass when told to."""

    def __init__(self, transport: Any, server: InferenceServer, threads: ThreadPoolExecutor) -> None:
        self._server = server
        self._threads = threads
        self._transport = transport
        self.clients = transport.clients(4)

    def wait_for_pending(self, count: int) -> None:
        eventually(lambda: self._server.stats().pending == count)

    def call(self, index: int, value: float, timeout: float | None) -> Future[TensorDictBase]:
        """Let a client call; return when the thread has had time to wait for its reply."""
        before = self._server.stats().pending
        future: Future[TensorDictBase] = self._threads.submit(self.clients[index], request(value), timeout)
        self.wait_for_pending(before + 1)
        time.sleep(0.05)  # orders nothing: it may wait by then, or be about to
        return future


@contextmanager
def passing(make: Any) -> Iterator[tuple[Passing, dict[float, threading.Event]]]:
    gates = {float(value): threading.Event() for value in range(10)}  # made beforehand: two threads look them up
    entered = threading.Event()

    def model(td: TensorDictBase) -> TensorDictBase:
        value = float(td["observation"][0, 0])
        if value == 0:
            entered.set()
        assert value < 0 or gates[value].wait(HANG)
        return double(td)

    transport = make()
    with ThreadPoolExecutor(8) as threads, InferenceServer(model, transport, max_batch_size=1) as server:
        try:
            callers = Passing(transport, server, threads)
            for client in callers.clients:
                assert is_double(client(request(-1), HANG), -1)
            held = transport.client().submit(request(0))  # stands in the model while the others line up
            assert entered.wait(HANG)
            yield callers, gates
        finally:
            for value in range(10):
                gates[value].set()
        assert is_double(held.result(HANG), 0)


@pytest.mark.parametrize(
    ("first_timeout", "second_timeout"),
    [(None, None), (HANG, HANG), (None, HANG), (HANG, None)],
    ids=["for ever", "with deadlines", "the first for ever", "the second for ever"],
)
@pytest.mark.parametrize("make", MAKES)
def test_a_thread_gets_its_reply_though_others_wait_longer(
    make: Any, first_timeout: float | None, second_timeout: float | None
) -> None:
    with passing(make) as (callers, gates):
        first = callers.call(0, 1, first_timeout)
        others = [callers.call(index, 1 + index, second_timeout) for index in (1, 2, 3)]
        gates[0].set()
        gates[1].set()
        assert is_double(first.result(SOON), 1)
        gates[2].set()
        assert is_double(others[0].result(SOON), 2)
        gates[3].set()
        assert is_double(others[1].result(SOON), 3)
        gates[4].set()
        assert is_double(others[2].result(SOON), 4)


@pytest.mark.parametrize("forever", [True, False])
@pytest.mark.parametrize("make", MAKES)
def test_a_deadline_is_kept_though_replies_of_other_threads_come_and_go(
    make: Any, forever: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0  # so that it does not pass before the next one has lined up
    monkeypatch.setattr(connection_module, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    with passing(make) as (callers, gates):
        first = callers.call(0, 1, HANG)
        late = callers.call(1, 2, 0.2)
        last = callers.call(2, 3, None if forever else HANG)
        gates[0].set()
        gates[1].set()
        assert is_double(first.result(SOON), 1)
        now = 1.0
        expect_error(TimeoutError, late)
        assert not last.done()
        gates[2].set()
        gates[3].set()
        assert is_double(last.result(SOON), 3)


@pytest.mark.parametrize("timeout", [None, HANG])
@pytest.mark.parametrize("make", MAKES)
def test_a_future_is_resolved_though_a_thread_waits_longer(make: Any, timeout: float | None) -> None:
    with passing(make) as (callers, gates):
        future = callers.clients[0].submit(request(1))
        callers.wait_for_pending(1)
        waiting = callers.call(1, 2, timeout)
        gates[0].set()
        gates[1].set()
        assert is_double(future.result(SOON), 1)
        again = callers.clients[0].submit(request(3))
        gates[2].set()
        gates[3].set()
        assert is_double(waiting.result(SOON), 2)
        assert is_double(again.result(SOON), 3)


@pytest.mark.parametrize("make", MAKES)
def test_threads_of_one_connection_get_their_own_replies_whether_they_have_deadlines_or_not(make: Any) -> None:
    transport = make()

    def ask(index: int, client: Any) -> None:
        for value in range(400):
            timeout = (None, HANG)[(value // 7 + index) % 2]
            reply = client(request(1000 * index + value), timeout)
            assert is_double(reply, 1000 * index + value)

    with InferenceServer(double, transport, max_batch_size=3), ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(ask, *pair) for pair in enumerate(transport.clients(8))]:
            done.result(HANG)
