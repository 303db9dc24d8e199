"""Calls out of which a signal's handler raises: a Ctrl-C that is caught, a deadline by SIGALRM."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from aioinfer import InferenceServer, MPTransport
from aioinfer.testing import double, request
from aioinfer.testing.callers import is_double
from tests.effort import Effort
from tests.frames import is_within
from tests.limits import HANG
from tests.process_workers import Child
from tests.transports import process_slots

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # 3.12: of a process that has threads
]

MAKES: list[Any] = [process_slots, MPTransport]
BOUND = 20.0  # seconds; twice as many end it, on a machine that is slower than that by far


class Stop(Exception):
    """What the handler raises."""


def _stop(*_: object) -> None:
    raise Stop


class Neighbours:
    """Threads that call through the same connection as the one that is interrupted."""

    def __init__(self, clients: list[Any]) -> None:
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=pair) for pair in enumerate(clients)]
        self.replies = [0] * len(clients)
        self.faults: list[str] = []
        for thread in self._threads:
            thread.start()

    def _ask(self, index: int, client: Any) -> None:
        value = 0
        while not self._end.is_set():
            value += 1
            try:
                if index == 2:
                    reply = client.submit(request(value)).result(HANG)
                else:
                    reply = client(request(value), HANG if index else None)
                assert is_double(reply, value), (value, reply)
            except BaseException as error:
                self.faults.append(f"neighbour {index}: {error!r}")
                return
            self.replies[index] += 1

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(HANG)
            if thread.is_alive():
                self.faults.append("a neighbour hangs")
        if not all(self.replies):
            self.faults.append(f"some had no reply: {self.replies}")


# tensordict makes other errors of one that interrupts it, so requests are made beforehand.
REQUESTS = [request(value) for value in range(16)]


def call(client: Any, value: int) -> Any:
    return client(REQUESTS[value % 16], HANG if value % 2 else None)


def interrupt_always(
    line: Connection[Any, Any], clients: list[Any], act: Callable[[Any, int], Any], chance: random.Random, wanted: int
) -> None:
    """Call a client in the main thread, and interrupt that at random moments; tell what went wrong, and the time."""
    client, *others = clients
    call(client, 1)
    neighbours = Neighbours(others)
    began, value, times = time.monotonic(), 0, 0
    faults: list[str] = []

    def ask_on() -> None:
        nonlocal value
        while True:
            value += 1
            reply = act(client, value)
            if float(reply["action"][0]) != 2 * (value % 16):
                faults.append(f"{value} was answered with {reply}")

    def stop(_: int, frame: FrameType | None) -> None:
        if is_within(frame, ask_on.__code__):  # and not behind it, where one more may come before the timer is stopped
            raise Stop

    signal.signal(signal.SIGALRM, stop)
    try:
        while times < wanted and not faults and time.monotonic() - began < 2 * BOUND:
            try:
                # Again after a while: the first may come before it, and what is raised inside a finalizer goes nowhere.
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00005, 0.0015), 1.0)
                ask_on()
            except Stop:
                signal.setitimer(signal.ITIMER_REAL, 0)
                times += 1
            except BaseException as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                faults.append(f"interrupted: {error!r}")
            value += 1
            if not is_double(client(request(value), HANG), value):
                faults.append(f"{value} was not answered afterwards")
        took = time.monotonic() - began
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faults.append(f"afterwards: {error!r}")
    finally:
        neighbours.end()
    line.send((faults + neighbours.faults, times, took))
    line.recv()


@pytest.mark.parametrize("neighbours", [0, 3], ids=["alone", "beside others"])
@pytest.mark.parametrize("make", MAKES)
def test_a_call_that_is_interrupted_at_any_moment_costs_nobody_a_reply_and_leaves_its_client_usable(
    make: Any, neighbours: int, effort: Effort
) -> None:
    transport, wanted = make(), effort.times(300, stress=2000)
    with (
        InferenceServer(double, transport),
        Child("fork", interrupt_always, transport.clients(1 + neighbours), call, effort.random(), wanted) as child,
    ):
        assert child.line.poll(3 * BOUND), "it hangs"
        faults, times, took = child.line.recv()
        assert not faults
        assert times == wanted, took


def ask_anew(client: Any, value: int) -> Any:
    """Submit, wait a moment, and give the request up: a future that is interrupted is nobody's any more."""
    future = client.submit(REQUESTS[value % 16])
    try:
        while not future.done():
            time.sleep(0)
        return future.result()
    finally:
        future.cancel()


def test_a_submit_that_is_interrupted_at_any_moment_leaves_its_client_usable(effort: Effort) -> None:
    transport, wanted = MPTransport(), effort.times(300, stress=2000)
    with (
        InferenceServer(double, transport),
        Child("fork", interrupt_always, transport.clients(4), ask_anew, effort.random(), wanted) as child,
    ):
        assert child.line.poll(3 * BOUND), "it hangs"
        faults, times, took = child.line.recv()
        assert not faults
        assert times == wanted, took


class Slow:
    """Takes its time to pickle, and tells when it has begun."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self._begun = begun

    def __reduce__(self) -> Any:
        self._begun()
        return int, (3,)


def interrupt_pickling(line: Connection[Any, Any], client: Any) -> None:
    def begun() -> None:
        if not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, _stop)
    raised: list[bool] = []
    acts: list[Callable[[Any], Any]] = [lambda td: client(td, HANG), lambda td: client.submit(td).result(HANG)]
    outcomes: list[Any] = []
    for act in acts:
        raised.clear()
        td = TensorDict({"observation": torch.ones(3), "odd": NonTensorData(Slow(begun))})
        try:
            outcomes.append(act(td))
        except Exception as error:
            outcomes.append(type(error).__name__)
        outcomes.append(float(act(request(2))["action"][0]))
    line.send(outcomes)
    line.recv()


def test_an_exception_that_a_handler_raises_while_a_request_is_pickled_comes_out_as_itself() -> None:
    transport = MPTransport()
    with InferenceServer(double, transport), Child("fork", interrupt_pickling, transport.client()) as child:
        assert child.hear() == ["Stop", 4.0, "Stop", 4.0]
