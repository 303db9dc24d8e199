"""Exceptions out of signal handlers, at any moment of a send or of a receive."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import FrameType

import pytest

from aioinfer import InferenceServer, ThreadingTransport, WeightSyncError
from aioinfer.ipc.selector import Source, wait_readable
from aioinfer.testing.inspection import sender_of
from aioinfer.weight_sync import receiver
from tests.effort import Effort
from tests.frames import is_within
from tests.limits import HANG
from tests.weight_models import SCHEMES, Counter, mark, policy
from tests.weights.workers import Scheme, following, scheme, value_of

__all__ = ["scheme"]

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.usefixtures("finalizers_may_be_interrupted"),
]


class Interruption(BaseException):
    """As ``KeyboardInterrupt``."""


class Deadline(TimeoutError):
    """As programs raise out of their handlers."""


class Strange(Exception):
    """Anything else."""


Error = type[BaseException]
ERRORS: list[Error] = [Interruption, Deadline, Strange]


def repeat(step: Callable[[], object]) -> None:
    """Do ``step`` again and again until a signal interrupts it."""
    while True:
        step()


def interruptions(effort: Effort, step: Callable[[], object], check: Callable[[], object], error: Error) -> None:
    """Interrupt ``step`` at random moments; afterwards all must be well each time."""
    chance = effort.random()

    def interrupt(_: int, frame: FrameType | None) -> None:
        if is_within(frame, repeat.__code__):  # and not behind it, where one more may come before the timer is stopped
            raise error

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(effort.times(100, stress=700)):
            # Again, if the first one came before it, or in a finalizer.
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 1e-3), 1.0)
            with suppress(error):
                repeat(step)
            signal.setitimer(signal.ITIMER_REAL, 0)
            check()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", ERRORS)
def test_a_send_that_is_interrupted_anywhere_leaves_everything_as_it_should_be(
    scheme: Scheme, error: Error, effort: Effort
) -> None:
    source, target = Counter(0), Counter(0)
    scheme.init_on_sender(model=source)
    number = 0

    def send() -> None:
        nonlocal number
        number += 1
        scheme.send(Counter(number))
        assert value_of(target) == number

    with following(scheme, 0, target):
        scheme.connect(timeout=HANG)
        interruptions(effort, send, send, error)
        scheme.send_async(Counter(-1))
        scheme.wait_async()
        assert value_of(target) == -1
    assert len(sender_of(scheme).pool.refcounts) <= 4
    assert sender_of(scheme).workers[0].unanswered == 0


@pytest.mark.parametrize("make", SCHEMES)
@pytest.mark.parametrize("verb", ["shutdown", "send"])
def test_a_handler_may_use_the_scheme_whose_send_it_has_interrupted(
    make: Callable[..., Scheme], verb: str, effort: Effort
) -> None:
    chance, interrupted = effort.random(), 0
    before = signal.getsignal(signal.SIGALRM)
    try:
        for _ in range(effort.times(25, stress=100)):
            scheme, target = make(timeout=HANG), Counter(0)
            use = scheme.shutdown if verb == "shutdown" else partial(scheme.send, Counter(1))

            def handle(_: int, frame: FrameType | None, use: Callable[[], None] = use) -> None:
                nonlocal interrupted
                interrupted += 1
                use()

            signal.signal(signal.SIGALRM, handle)
            scheme.init_on_sender(model=Counter(0))
            with following(scheme, 0, target):
                scheme.connect(timeout=HANG)
                started = time.monotonic()
                seen = interrupted
                with suppress(RuntimeError, WeightSyncError):  # refused, or left unanswered
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 1e-3))
                    while seen == interrupted:
                        scheme.send(Counter(2))
                assert time.monotonic() - started < HANG / 2
                if verb == "send":
                    scheme.send(Counter(3))
                    assert value_of(target) == 3
            scheme.shutdown()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("unread", [False, True])
def test_a_receive_ends_when_a_handler_shuts_its_scheme_down(
    scheme: Scheme, unread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme.init_on_sender(model=Counter(0))
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=Counter(0))
    scheme.connect()
    own.connect()

    def shut_down(*_: object) -> None:
        own.shutdown()
        if unread:
            scheme.send_async(Counter(1))

    def wait(sources: Sequence[Source], timeout: float | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # and not before it has looked once
        wait_readable(sources, timeout)

    monkeypatch.setattr(receiver, "wait_readable", wait)
    before = signal.signal(signal.SIGALRM, shut_down)
    started = time.monotonic()
    try:
        assert own.receive(timeout=HANG) is None
        assert time.monotonic() - started < HANG / 2
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", ERRORS)
def test_a_receive_that_is_interrupted_anywhere_is_neither_torn_nor_unanswered(
    scheme: Scheme, error: Error, effort: Effort
) -> None:
    target, end = policy(0.0), threading.Event()
    scheme.init_on_sender(model=policy(0.0))
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target)
    scheme.connect()
    own.connect()

    def train() -> set[str]:
        source, failures, number = policy(0.0), set(), 0
        while not end.is_set():
            mark(source, number := number + 1)
            try:
                scheme.send(source)
            except WeightSyncError as refused:
                failures.add(str(refused))
        return failures

    def whole() -> None:
        ends = [tensor.detach().flatten()[[0, -1]] for tensor in (*target.parameters(), *target.buffers())]
        values = {float(value) for pair in ends for value in pair}
        assert len(values) == 1

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        try:
            interruptions(effort, lambda: own.receive(0.01), whole, error)
        finally:
            end.set()
            while not training.done():
                own.receive(0.01)
        assert training.result(HANG) <= {f"worker 0 refused: {error.__name__}: "}  # and not that it died, or is silent
    whole()
    own.shutdown()


@pytest.mark.parametrize("error", ERRORS)
def test_a_server_follows_a_trainer_that_is_interrupted(scheme: Scheme, error: Error, effort: Effort) -> None:
    scheme.init_on_sender(model=policy(0.0))
    with InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme.for_worker(0), swap_weights=True):
        scheme.connect(timeout=HANG)
        interruptions(effort, scheme.send, scheme.send, error)
