"""Servers in processes of their own: what a signal handler may do to a thread that uses their handle."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

import pytest

from aioinfer import MPTransport, ProcessInferenceServer, ServerClosedError, ServerNotRunningError, ServerPausedError
from aioinfer.testing import eventually, request
from aioinfer.testing.inspection import has_pending_command, weight_sender_of
from tests.effort import Effort
from tests.hosted import forked, make_policy
from tests.limits import HANG
from tests.weight_models import mark_of, policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.usefixtures("exits_by_itself", "finalizers_may_be_interrupted"),
]


class Interrupt(Exception):
    """A signal handler raises it."""


class Alarm:
    """Calls ``action`` once, from a signal handler, some time after it was set."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.rang = True

    def set(self, seconds: float) -> None:
        self.rang = False
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def ring(self, number: int, frame: FrameType | None) -> None:
        if not self.rang:
            self.rang = True
            self._action()


@contextmanager
def alarm(action: Callable[[], None]) -> Iterator[Alarm]:
    made = Alarm(action)
    before = signal.signal(signal.SIGALRM, made.ring)
    try:
        yield made
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt() -> None:
    raise Interrupt


def pause(server: ProcessInferenceServer) -> None:
    with server.paused("reject"):
        pass


def is_served(server: ProcessInferenceServer) -> bool:
    try:
        return mark_of(server.client()(request(0), HANG)) in (0, 1)
    except ServerPausedError:
        return False


WEIGHTS = policy(1.0)
VERBS: dict[str, Callable[[ProcessInferenceServer], object]] = {
    "health": lambda server: server.health(HANG),
    "stats": lambda server: server.stats(),
    "update_weights": lambda server: server.update_weights(WEIGHTS),
    "paused": pause,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ProcessInferenceServer]:
    with forked(make_policy) as started:
        yield started


@pytest.mark.parametrize("verb", VERBS)
def test_calls_that_a_signal_handler_interrupts_leave_nothing_behind(
    server: ProcessInferenceServer, verb: str, effort: Effort
) -> None:
    call, rng = VERBS[verb], effort.random()
    with alarm(interrupt) as ringing:
        for _ in range(effort.times(100, stress=500)):
            with suppress(Interrupt):
                ringing.set(rng.uniform(1e-5, 2e-3))
                while not ringing.rang:
                    call(server)
            eventually(lambda: is_served(server))  # with the exception gone, it goes on
    assert server.health(HANG).ready
    server.update_weights(policy(1.0))
    assert mark_of(server.client()(request(0), HANG)) == 1
    eventually(lambda: not has_pending_command(server))
    assert len(weight_sender_of(server).pools) <= 2


@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_handler_may_shut_the_server_down_whatever_it_interrupts(verb: str, effort: Effort) -> None:
    call, rng = VERBS[verb], effort.random()
    for _ in range(effort.times(5, stress=20)):
        server = forked(make_policy).start()
        with alarm(server.shutdown) as ringing:
            began = time.monotonic()
            ringing.set(rng.uniform(1e-4, 2e-2))
            with suppress(ServerClosedError, ServerNotRunningError):
                while not ringing.rang:
                    call(server)
        assert ringing.rang
        assert not server.is_alive
        assert time.monotonic() - began < HANG


def test_a_signal_handler_may_shut_down_a_server_that_starts_or_shuts_down(effort: Effort) -> None:
    rng = effort.random()
    for _ in range(effort.times(8, stress=30)):
        server = forked(make_policy)
        reply = server.client().submit(request(0))
        with alarm(server.shutdown) as ringing:
            began = time.monotonic()
            ringing.set(rng.uniform(1e-5, 0.1))
            with suppress(ServerClosedError):
                server.start()
            server.shutdown()
            eventually(lambda: ringing.rang)
        assert not server.is_alive
        assert time.monotonic() - began < HANG
        reply.exception(HANG)  # it has ended, one way or the other


def test_a_start_that_finds_its_transport_used_by_a_shutdown_meanwhile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    server = forked(make_policy)
    reply = server.client().submit(request(0))
    check_unused = MPTransport.check_unused

    def shut_down_and_check(transport: MPTransport) -> None:
        server.shutdown()
        check_unused(transport)

    monkeypatch.setattr(MPTransport, "check_unused", shut_down_and_check)
    with pytest.raises(ServerClosedError, match="before it started"):
        server.start()
    assert isinstance(reply.exception(HANG), ServerClosedError)


def test_a_start_that_a_signal_handler_interrupts_leaves_no_process(effort: Effort) -> None:
    rng = effort.random()
    with alarm(interrupt) as ringing:
        for _ in range(effort.times(8, stress=30)):
            server = forked(make_policy)
            reply = server.client().submit(request(0))
            try:
                ringing.set(rng.uniform(1e-5, 0.06))
                server.start()
                eventually(partial(getattr, ringing, "rang"))
            except Interrupt:
                pass
            server.shutdown()
            assert not server.is_alive
            reply.exception(HANG)  # it has ended, one way or the other


def test_a_start_that_is_interrupted_while_its_thread_begins_raises_what_the_handler_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        start_thread(thread)
        if thread.name == "aioinfer-host":
            try:
                raise Interrupt
            finally:
                threading.Lock().release()  # as a condition does that could not take its lock again

    start_thread = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    server = forked(make_policy)
    with pytest.raises(Interrupt):
        server.start()
    monkeypatch.undo()
    server.shutdown()
    assert not server.is_alive
