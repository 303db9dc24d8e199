"""A signal handler that raises, or that shuts the server down, at any moment of any call leaves nothing stuck."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from aioinfer import (
    ClientBusyError,
    InferenceServer,
    InferenceTransport,
    ServerClosedError,
    ServerOverloadedError,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer import transports as transports_package
from aioinfer.testing import double, eventually, request
from aioinfer.testing.callers import is_double
from tests.effort import Effort
from tests.limits import HANG
from tests.weight_models import mark_of, policy

TRANSPORTS_CODE = str(Path(transports_package.__file__).parent)

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer"),
    pytest.mark.usefixtures("finalizers_may_be_interrupted"),
]


class Interrupt(BaseException):
    """Not one that code which makes a request or copies weights takes for an error of its own."""


@contextmanager
def handling(handler: Callable[[FrameType | None], None]) -> Iterator[None]:
    """Call the handler with the frame that a timer's signal interrupts."""
    before = signal.signal(signal.SIGALRM, lambda _, frame: handler(frame))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt(effort: Effort, action: Callable[[], Any]) -> None:
    """Let ``action`` run again and again, interrupted at random moments."""
    chance, deadline = effort.random(), time.monotonic() + 2 * HANG

    def raise_interrupt(frame: FrameType | None) -> None:
        if frame is None or frame.f_code is not interrupt.__code__:  # which may be dealing with another one
            raise Interrupt

    with handling(raise_interrupt):
        for _ in range(effort.times(300, stress=2000)):
            assert time.monotonic() < deadline
            try:
                # Again after a while: what is raised inside a finalizer goes nowhere.
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 0.0006), 0.02)
                while True:
                    action()
            except Interrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def others(server: InferenceServer) -> Iterator[None]:
    """Threads that call all the while, and get their own replies."""
    over, wrong = threading.Event(), list[float]()

    def call(start: int, client: Any) -> None:
        value = start
        while not over.is_set():
            if not is_double(client(request(value), HANG, wait=True), value):
                wrong.append(value)
            value += 1
            time.sleep(0.0005)

    threads = [threading.Thread(target=call, args=(1000 * i, server.client())) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(HANG)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong


TRANSPORTS: dict[str, Callable[[], InferenceTransport]] = {
    "threading": ThreadingTransport,
    "slots": lambda: SlotTransport(4),
    "slots-preallocated": lambda: SlotTransport(4, preallocate=True),
}
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "call": lambda client, td: client(td),
    "call with a deadline": lambda client, td: client(td, HANG),
    "call that waits for room": lambda client, td: client(td, HANG, wait=True),
    "submit": lambda client, td: client.submit(td).result(),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_is_interrupted_anywhere_leaves_client_and_server_usable(
    transport: str, call: str, effort: Effort
) -> None:
    with InferenceServer(double, TRANSPORTS[transport](), max_pending=8) as server, others(server):
        client = server.client()
        requests = [(value, request(value)) for value in range(16)]

        def act() -> None:
            value, td = random.choice(requests)
            try:
                reply = CALLS[call](client, td)
            except (ClientBusyError, ServerOverloadedError):  # lost futures, whose requests are still under way
                if call != "submit":
                    raise
            else:
                assert is_double(reply, value)

        interrupt(effort, act)

        def is_free() -> bool:
            try:
                return is_double(client(request(7), HANG), 7)
            except (ClientBusyError, ServerOverloadedError):  # the requests of lost futures are still under way
                return False

        eventually(is_free)
        eventually(lambda: server.stats().pending == 0)


@pytest.mark.parametrize("pending", ["keep", "wait", "reject"])
def test_a_pause_that_is_interrupted_anywhere_is_over(pending: Any, effort: Effort) -> None:
    with InferenceServer(double, ThreadingTransport()) as server:

        def pause() -> None:
            with server.paused(pending):
                pass

        interrupt(effort, pause)
        assert is_double(server.client()(request(1), HANG), 1)


def test_updates_and_statistics_that_are_interrupted_anywhere_leave_the_server_usable(effort: Effort) -> None:
    with InferenceServer(policy(0.0), ThreadingTransport()) as server:
        weights = policy(1.0)
        interrupt(effort, lambda: server.update_weights(weights))
        interrupt(effort, lambda: (server.stats(), server.health()))
        server.update_weights(policy(2.0))
        assert mark_of(server.client()(request(1), HANG)) == 2
        assert server.stats().ok == 1


def interrupt_at_line(number: int, action: Callable[[], Any]) -> bool:
    """Let the main thread raise at the line of that number which it comes to in the package of the transports.

    Returns:
        Whether it came so far.
    """
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(TRANSPORTS_CODE):
            return None
        left -= event == "line"
        if left == 0:
            raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_no_request_is_lost_where_a_server_that_takes_its_transport_is_interrupted_at_any_line() -> None:
    transports: list[InferenceTransport] = []
    asked: list[Any] = []
    interrupted = True
    while interrupted:
        transport = ThreadingTransport()
        transports.append(transport)
        asked.append(transport.submit(request(len(asked))))
        interrupted = interrupt_at_line(len(asked), partial(InferenceServer, double, transport))
    assert len(transports) > 10
    with InferenceServer(double, transports):
        for value, future in enumerate(asked):
            assert is_double(future.result(HANG), value)


def shut_down_inside(server: InferenceServer, action: Callable[[], Any], seconds: float) -> None:
    """Shut down in a signal handler which interrupts ``action`` after so many seconds."""
    over = threading.Event()

    def shut_down(_: object) -> None:
        server.shutdown(HANG)
        over.set()

    with handling(shut_down):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        started = time.monotonic()
        while not over.is_set():
            try:
                action()
            except (ServerClosedError, RuntimeError):
                assert over.wait(HANG)
        assert time.monotonic() - started < HANG / 2


def _actions(server: InferenceServer) -> dict[str, Callable[[], Any]]:
    client = server.client()

    def pause() -> None:
        with server.paused():
            pass

    return {
        "call": lambda: client(request(1)),
        "bounded": lambda: client(request(1), wait=True),
        "submit": lambda: client.submit(request(1)).result(),
        "stats": server.stats,
        "update": lambda: server.update_weights(policy(1.0)),
        "pause": pause,
    }


@pytest.mark.parametrize("what", ["call", "submit", "bounded", "stats", "update", "pause"])
def test_a_signal_handler_may_shut_the_server_down(what: str, effort: Effort) -> None:
    chance = effort.random()
    max_pending = 4 if what == "bounded" else None
    for _ in range(effort.times(20, stress=60)):
        server = InferenceServer(policy(0.0), ThreadingTransport(), max_pending=max_pending).start()
        action = _actions(server)[what]
        shut_down_inside(server, action, chance.uniform(1e-5, 3e-3))
        assert not server.is_alive


def test_a_signal_handler_that_returns_disturbs_no_call() -> None:
    for make in TRANSPORTS.values():
        seen: list[object] = []
        with InferenceServer(double, make()) as server, handling(seen.append):
            client = server.client()
            signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
            started = time.monotonic()
            while time.monotonic() < started + 0.5 or len(seen) <= 100:
                assert time.monotonic() < started + HANG
                for timeout in (None, HANG):
                    assert is_double(client(request(3), timeout), 3)
            signal.setitimer(signal.ITIMER_REAL, 0)


async def test_a_pause_is_over_when_nobody_holds_it_any_more() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        pause = server.paused()
        await pause.__aenter__()
        asked = server.async_client().submit(request(1))
        await asyncio.sleep(0.01)
        assert not asked.done()
        del pause
        assert is_double(await asyncio.wait_for(asked, HANG), 1)
