from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import double, eventually, request
from aioinfer.transports.sleepers import Sleepers, Waiter, unwrap
from aioinfer.wakers import LockWaker, Waker, make_waker

HANG = 20.0


@pytest.fixture(params=[LockWaker, make_waker])
def make_bell(request: pytest.FixtureRequest) -> Callable[[], Waker]:
    made: Callable[[], Waker] = request.param
    return made


REPLY = TensorDict({})


def reply_of(waiter: Waiter, timeout: float = HANG) -> TensorDictBase:
    return unwrap(*waiter.wait(timeout))


def test_every_thread_of_a_batch_wakes_and_the_last_one_says_so(make_bell: Callable[[], Waker]) -> None:
    awake = threading.Event()
    waking: list[bool] = []
    sleepers = Sleepers(waking, awake.set)
    waiters = [Waiter(sleepers, make_bell()) for _ in range(20)]
    replies = [TensorDict({}) for _ in waiters]
    got: dict[int, object] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: reply_of(waiters[i])})) for i in range(20)]
    for thread in threads:
        thread.start()
    sleepers.deliver(waiters, replies)
    assert awake.wait(HANG)
    for thread in threads:
        thread.join()
    assert all(got[i] is replies[i] for i in range(20))
    assert not waking


def test_threads_that_left_do_not_break_the_chain(make_bell: Callable[[], Waker]) -> None:
    awake = threading.Event()
    waking: list[bool] = []
    sleepers = Sleepers(waking, awake.set)
    waiters = [Waiter(sleepers, make_bell()) for _ in range(20)]
    for waiter in waiters[::2]:
        with pytest.raises(TimeoutError):
            waiter.wait(0)
    threads = [threading.Thread(target=waiter.wait, args=(HANG,)) for waiter in waiters[1::2]]
    for thread in threads:
        thread.start()
    sleepers.deliver(waiters, [REPLY] * 20)
    assert awake.wait(HANG)
    for thread in threads:
        thread.join()


def test_a_thread_that_leaves_after_it_was_settled_passes_its_turn_on(make_bell: Callable[[], Waker]) -> None:
    waking: list[bool] = []
    sleepers = Sleepers(waking, lambda: None)
    waiters = [Waiter(sleepers, make_bell()) for _ in range(6)]
    sleepers.deliver(waiters, [REPLY] * 6)
    for waiter in reversed(waiters):  # the last ones are not released yet: they time out, and find their reply
        assert reply_of(waiter, 0) is REPLY
    assert not waking
    assert [waiter.done() for waiter in waiters[:2]] == [False, False]


def test_a_chain_that_does_not_go_on_is_given_up(make_bell: Callable[[], Waker]) -> None:
    waking: list[bool] = []
    sleepers = Sleepers(waking, lambda: None)
    waiters = [Waiter(sleepers, make_bell()) for _ in range(6)]
    sleepers.deliver(waiters, [REPLY] * 6)
    sleepers.wake_all()
    for waiter in waiters:
        assert reply_of(waiter) is REPLY


def test_a_used_waiter_waits_again(make_bell: Callable[[], Waker]) -> None:
    waking: list[bool] = []
    sleepers = Sleepers(waking, lambda: None)
    waiter = Waiter(sleepers, make_bell())
    for _ in range(3):
        sleepers.fail([waiter], [ArithmeticError("no")])
        with pytest.raises(ArithmeticError):
            reply_of(waiter)
        with_reply = TensorDict({})
        sleepers.deliver([waiter], [with_reply])
        assert reply_of(waiter) is with_reply
    with pytest.raises(TimeoutError):
        waiter.wait(0)
    assert waiter.done()
    sleepers.deliver([waiter], [REPLY])
    assert not waking


def test_impatient_threads_change_nothing_for_the_patient_ones() -> None:
    wrong: list[float] = []
    with InferenceServer(double, ThreadingTransport(), max_batch_size=8) as server:

        def patient(start: int) -> None:
            client = server.client()
            for value in range(start, start + 150):
                if client(request(value), HANG)["action"][0] != 2 * value:
                    wrong.append(value)

        def impatient(start: int) -> None:
            client = server.client()
            for value in range(start, start + 150):
                try:
                    if client(request(value), 0.0001)["action"][0] != 2 * value:
                        wrong.append(value)
                except TimeoutError:
                    pass

        threads = [threading.Thread(target=(patient, impatient)[i % 2], args=(1000 * i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        eventually(lambda: server.stats().pending == 0)
        assert server.stats().ok >= 12 * 150


def test_a_bell_wakes_the_one_that_waits_or_the_next(make_bell: Callable[[], Waker]) -> None:
    bell = make_bell()
    assert not bell.wait(0)
    assert not bell.wait(0.001)
    bell.notify()
    bell.notify()
    assert bell.wait(None)
    assert not bell.wait(-1)
    thread = threading.Thread(target=bell.notify)
    thread.start()
    assert bell.wait(1e30)
    thread.join()


def test_a_lock_serves_where_file_descriptors_have_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.eventfd", fail, raising=False)
    assert isinstance(make_waker(), LockWaker)
    monkeypatch.delattr("os.eventfd")
    assert isinstance(make_waker(), LockWaker)
