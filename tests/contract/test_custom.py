"""A custom transport beside others: it is drained in its turn, and costs nobody else time, room or a reply."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest
from tensordict import TensorDictBase

from aioinfer import InferenceServer, InferenceTransport, ServerClosedError, ThreadingTransport
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import has_waiting_callers
from aioinfer.transports import polling
from tests.limits import HANG
from tests.process_workers import Child
from tests.switching import switch_interval
from tests.transports import FiveVerbs


class Late(FiveVerbs):
    """Its requests take a while to arrive: it looks up for the first time when they have, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.arrived = threading.Event(), threading.Event()

    def wait_for_work(self, timeout: float) -> None:
        self.waiting.set()
        assert self.arrived.wait(2 * HANG)
        super().wait_for_work(timeout)


def test_a_request_that_takes_a_while_to_arrive_holds_no_other_transport_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "PUMP_LIMIT", 2 * HANG)  # a call that waits for the transport does not end
    custom, local = Late(), ThreadingTransport()
    with InferenceServer(double, [custom, local]):
        try:
            assert custom.waiting.wait(HANG)
            late, client = custom.client().submit(request(100)), local.client()
            for value in range(20):
                assert is_double(client(request(value), HANG), value)
        finally:
            custom.arrived.set()
        assert is_double(late.result(HANG), 100)


class Watched(FiveVerbs):
    """Tells that it is drained, and how many of its requests lie in the server's queue."""

    def __init__(self) -> None:
        super().__init__()
        self.drained = threading.Event()
        self.handed_over = self.taken = 0

    def wait_for_work(self, timeout: float) -> None:
        self.handed_over = self.taken
        super().wait_for_work(timeout)

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        self.drained.set()
        requests, futures = super().drain(max_items)
        self.taken += len(requests)
        return requests, futures


def test_requests_stay_in_the_transport_while_a_pass_runs() -> None:
    """There their callers can cancel them."""
    model, custom = GatedModel(), Watched()
    with InferenceServer(model, custom) as server:
        client = server.client()
        first = client.submit(request(0))
        assert model.entered.wait(HANG)
        custom.drained.clear()
        second, third = client.submit(request(1)), client.submit(request(2))
        assert not custom.drained.wait(0.7)  # the pump looks up every 0.3 seconds
        second.cancel()
        model.open()
        assert is_double(first.result(HANG), 0)
        assert is_double(third.result(HANG), 2)


class Flooded(FiveVerbs):
    """Whenever it is drained, the next request is there, up to ``LIMIT`` times in a row."""

    LIMIT = 100

    def __init__(self) -> None:
        super().__init__()
        self.in_a_row = self.most_in_a_row = 0

    def wait_for_work(self, timeout: float) -> None:
        self.in_a_row = 0
        super().wait_for_work(timeout)

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        taken = super().drain(max_items)
        self.in_a_row += 1
        self.most_in_a_row = max(self.most_in_a_row, self.in_a_row)
        if self.in_a_row < self.LIMIT:
            self.submit(request(9))
        return taken


def test_a_server_that_serves_what_is_left_does_not_follow_a_flood() -> None:
    model, custom = GatedModel(), Flooded()
    server = InferenceServer(model, custom).start()
    client = server.client()
    asked = [client.submit(request(0))]
    assert model.entered.wait(HANG)
    asked.append(client.submit(request(1)))  # of which the server hears after the pass
    most: list[int] = []
    asked[1].add_done_callback(lambda _: most.append(custom.most_in_a_row))
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(server.shutdown, HANG, drain=True)
        eventually(lambda: not server.health().ready)
        model.open()
        for value, future in enumerate(asked):
            assert is_double(future.result(HANG), value)
        ending.result(HANG)
    assert most[0] < Flooded.LIMIT


class Unnoticed(FiveVerbs):
    """Nobody who waits for its requests notices them."""

    def wait_for_work(self, timeout: float) -> None:
        time.sleep(timeout)


def test_a_server_that_is_idle_serves_what_is_in_a_transport_before_it_ends() -> None:
    custom, local = Unnoticed(), ThreadingTransport()
    server = InferenceServer(double, [custom, local]).start()
    assert is_double(local.client()(request(0), HANG), 0)
    asked = custom.client().submit(request(1))
    server.shutdown(HANG, drain=True)
    assert is_double(asked.result(HANG), 1)


def test_cancelled_requests_of_a_custom_transport_leave_room_in_a_bounded_queue() -> None:
    custom = Watched()
    with (
        InferenceServer(double, custom, max_pending=2, min_batch_size=3, timeout=HANG) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        client = server.client()
        asked = [client.submit(request(value)) for value in range(2)]
        eventually(lambda: custom.handed_over == 2)
        for future in asked:
            assert future.cancel()
        late = [client.submit(request(2)), pool.submit(client, request(3), HANG, wait=True)]
        eventually(lambda: server.stats().pending == 2)
        server.shutdown(HANG, drain=True)
        for value, future in enumerate(late, 2):
            assert is_double(future.result(HANG), value)
        assert server.stats().cancelled == 2


def test_a_request_counts_once_while_it_moves_into_the_queue() -> None:
    custom, count = Watched(), 100
    with (
        InferenceServer(double, custom, max_batch_size=count + 1, min_batch_size=count + 1, timeout=HANG) as server,
        ThreadPoolExecutor(1) as pool,
        switch_interval(1e-5),
    ):
        client = server.client()
        for before in range(count):
            asked = pool.submit(client.submit, request(before))
            seen = {before, before + 1}
            while custom.handed_over == before:
                seen.add(server.stats().pending)
            assert seen == {before, before + 1}
            assert not asked.result(HANG).done()


class Interrupted(FiveVerbs):
    """What drains it, or what submits to it, stops in the middle until it may go on."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.pump = threading.current_thread()

    def wait_for_work(self, timeout: float) -> None:
        self.pump = threading.current_thread()
        super().wait_for_work(timeout)

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        if self.method == "submit":
            self._stop()
        return super().submit(td)

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        drained = super().drain(max_items)
        if self.method == "drain" and drained[0]:
            self._stop()
        return drained

    def _stop(self) -> None:
        self.stopped.set()
        assert self.go_on.wait(HANG)


@pytest.mark.parametrize("method", ["drain", "submit"])
def test_a_request_that_arrives_as_the_server_closes_does_not_wait_for_the_running_pass(method: str) -> None:
    model, custom, local = GatedModel(), Interrupted(method), ThreadingTransport()
    server = InferenceServer(model, [custom, local]).start()
    with ThreadPoolExecutor(3) as pool:
        try:
            asked = [pool.submit(custom.client(), request(0), HANG)]
            assert custom.stopped.wait(HANG)
            running = local.client().submit(request(1))
            assert model.entered.wait(HANG)
            pending = local.client().submit(request(2))
            if method == "drain":
                asked.append(pool.submit(custom.client(), request(3), HANG))
                eventually(lambda: server.stats().pending == 3)  # rather than when the pump drains: it has stopped
            ending = pool.submit(server.shutdown, HANG)
            assert isinstance(pending.exception(HANG), ServerClosedError)
            if method == "submit":
                eventually(lambda: not custom.pump.is_alive())
            custom.go_on.set()
            for reply in asked:
                assert isinstance(reply.exception(HANG), ServerClosedError)
            assert not running.done()
        finally:
            custom.go_on.set()
            model.open()
        ending.result(HANG)


class Submitting(FiveVerbs):
    """What follows the submission of the value 0 takes until it may go on: ``submit`` itself, or a callback.

    Whoever waits for the reply has it before callbacks run.
    """

    def __init__(self, *, in_callback: bool = False) -> None:
        super().__init__()
        self.in_callback = in_callback
        self.go_on = threading.Event()

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        future = super().submit(td)
        if td["observation"][0] == 0:
            if self.in_callback:
                future.add_done_callback(lambda _: self.go_on.wait(HANG))
            else:
                assert self.go_on.wait(HANG)
        return future


def test_a_request_that_a_pass_has_taken_leaves_room_even_if_its_caller_is_still_submitting_it() -> None:
    model, custom = GatedModel(), Submitting()
    with InferenceServer(model, custom, max_pending=1) as server, ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(custom.client(), request(0), HANG)
            assert model.entered.wait(HANG)
            second = server.client().submit(request(1))
            assert not second.done()
        finally:
            custom.go_on.set()
            model.open()
        assert is_double(first.result(HANG), 0)
        assert is_double(second.result(HANG), 1)


def test_who_waits_for_room_is_told_when_an_answered_request_has_been_submitted() -> None:
    model, custom = GatedModel(), Submitting()
    with InferenceServer(model, custom, max_pending=1) as server, ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(custom.client(), request(0), HANG)
            assert model.entered.wait(HANG)
            model.open()
            eventually(lambda: server.stats().ok == 1)
            second = pool.submit(custom.client(), request(1), HANG / 2, wait=True)
            eventually(lambda: has_waiting_callers(server))
        finally:
            custom.go_on.set()
            model.open()
        assert is_double(first.result(HANG), 0)
        assert is_double(second.result(HANG), 1)


def test_who_has_a_reply_has_left_room_for_the_next_request() -> None:
    model, custom = GatedModel(), Submitting(in_callback=True)
    with InferenceServer(model, custom, max_pending=1) as server:
        client = server.client()
        try:
            first = client.submit(request(0))
            model.open()  # now that the future has its callback, which else would not run in the thread that settles it
            assert is_double(first.result(HANG), 0)
            assert server.stats().pending == 0
            second = client.submit(request(1))
            assert not second.done()
            assert server.stats().pending == 1
        finally:
            custom.go_on.set()
            model.open()
        assert is_double(second.result(HANG), 1)


class Distant(FiveVerbs):
    """Its replies are on their way for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.resolved: queue.Queue[tuple[Future[TensorDictBase], TensorDictBase]] = queue.Queue()

    def resolve(self, callback: Future[TensorDictBase], result: TensorDictBase) -> None:
        self.resolved.put((callback, result))

    def deliver(self) -> None:
        future, reply = self.resolved.get(timeout=HANG)
        future.set_result(reply)


def test_who_waits_for_room_is_told_when_a_reply_arrives() -> None:
    custom = Distant()
    with InferenceServer(double, custom, max_pending=1) as server, ThreadPoolExecutor(1) as pool:
        first = server.client().submit(request(0))
        eventually(lambda: custom.resolved.qsize() == 1 and server.stats().pending == 1)
        second = pool.submit(server.client(), request(1), HANG / 2, wait=True)
        eventually(lambda: has_waiting_callers(server))
        custom.deliver()
        assert is_double(first.result(HANG), 0)
        custom.deliver()
        assert is_double(second.result(HANG), 1)


def test_requests_do_not_wait_for_the_running_pass_as_the_server_closes_if_one_in_it_is_cancelled() -> None:
    model, custom = GatedModel(), FiveVerbs()
    server = InferenceServer(model, custom, max_batch_size=1).start()
    client = server.client()
    with ThreadPoolExecutor(1) as pool:
        try:
            running = client.submit(request(0))
            assert model.entered.wait(HANG)
            asked = [client.submit(request(value)) for value in range(1, 4)]
            assert running.cancel()
            ending = pool.submit(server.shutdown, HANG)
            for future in asked:
                assert isinstance(future.exception(HANG / 4), ServerClosedError)
            assert not ending.done()
        finally:
            model.open()
        ending.result(HANG)


class Reluctant(Watched):
    """Takes its time to fail a request."""

    def __init__(self) -> None:
        super().__init__()
        self.failing, self.go_on = threading.Event(), threading.Event()

    def resolve_exception(self, callback: Any, exc: BaseException) -> None:
        self.failing.set()
        assert self.go_on.wait(HANG)


@pytest.mark.parametrize("first", ["local", "custom"])
def test_who_drops_a_cancelled_request_of_a_custom_transport_keeps_no_other_caller_waiting(first: str) -> None:
    """It calls the transport's own code, in the thread of a caller who finds the queue full."""
    custom, local = Reluctant(), ThreadingTransport()
    with (
        InferenceServer(double, [custom, local], max_pending=2, min_batch_size=3, timeout=HANG) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        try:
            asked = [custom.client().submit(request(value)) for value in range(2)]
            eventually(lambda: custom.handed_over == 2)
            for future in asked:
                assert future.cancel()
            transports: dict[str, InferenceTransport] = {"local": local, "custom": custom}
            dropping = pool.submit(transports[first].client().submit, request(2))
            assert custom.failing.wait(HANG)
            other = pool.submit(local.submit, request(3)).result(HANG)
        finally:
            custom.go_on.set()
        taken = [dropping.result(HANG), other]
        server.shutdown(HANG, drain=True)
        for value, future in enumerate(taken, 2):
            assert is_double(future.result(HANG), value)


def serve_anew(line: Connection[Any, Any], custom: FiveVerbs) -> None:
    """Serve a transport in a child of the process that serves it."""
    custom.queue, custom.peeked = queue.Queue(), []
    with InferenceServer(double, custom, max_pending=1) as server:
        pending = server.stats().pending
        line.send((pending, [float(server.client()(request(value), HANG)["action"][0]) for value in (2, 3)]))
        line.recv()


def test_a_forked_child_serves_a_custom_transport_without_the_requests_of_its_parent() -> None:
    model, custom = GatedModel(), FiveVerbs()
    with InferenceServer(model, custom, max_pending=1) as server:
        first = server.client().submit(request(0))
        assert model.entered.wait(HANG)
        second = server.client().submit(request(1))
        with Child("fork", serve_anew, custom) as child:
            assert child.hear() == (0, [4, 6])
        model.open()
        for value, future in enumerate((first, second)):
            assert is_double(future.result(HANG), value)
