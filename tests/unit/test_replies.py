from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import double, eventually, request
from aioinfer.transports.replies import LockWaker, ThreadReplySink, Waiter, Waker, make_waker, unwrap
from tests.limits import HANG


@pytest.fixture(params=[LockWaker, make_waker])
def make_one(request: pytest.FixtureRequest) -> Callable[[], Waker]:
    made: Callable[[], Waker] = request.param
    return made


REPLY = TensorDict({})


def sink_and_wakeups(notify: Callable[[], None]) -> tuple[ThreadReplySink, list[bool]]:
    """The sink of a transport whose queue is notified thus, and the wake-ups that the queue knows of."""
    transport = ThreadingTransport()
    transport.queue.notify = notify  # type: ignore[method-assign]
    return transport.thread_sink, transport.queue.wakeups_in_flight


def reply_of(waiter: Waiter, timeout: float = HANG) -> TensorDictBase:
    return unwrap(*waiter.wait(timeout))


def test_every_thread_of_a_batch_wakes_and_the_last_one_says_so(make_one: Callable[[], Waker]) -> None:
    awake = threading.Event()
    sink, wakeups = sink_and_wakeups(awake.set)
    waiters = [Waiter(sink, make_one()) for _ in range(20)]
    replies = [TensorDict({}) for _ in waiters]
    got: dict[int, object] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: reply_of(waiters[i])})) for i in range(20)]
    for thread in threads:
        thread.start()
    sink.set_results(waiters, replies)
    assert awake.wait(HANG)
    for thread in threads:
        thread.join()
    assert all(got[i] is replies[i] for i in range(20))
    assert not wakeups


def test_threads_that_left_do_not_break_the_chain(make_one: Callable[[], Waker]) -> None:
    awake = threading.Event()
    sink, _ = sink_and_wakeups(awake.set)
    waiters = [Waiter(sink, make_one()) for _ in range(20)]
    for waiter in waiters[::2]:
        with pytest.raises(TimeoutError):
            waiter.wait(0)
    threads = [threading.Thread(target=waiter.wait, args=(HANG,)) for waiter in waiters[1::2]]
    for thread in threads:
        thread.start()
    sink.set_results(waiters, [REPLY] * 20)
    assert awake.wait(HANG)
    for thread in threads:
        thread.join()


def test_a_thread_that_leaves_after_it_was_settled_passes_its_turn_on(make_one: Callable[[], Waker]) -> None:
    sink, wakeups = sink_and_wakeups(lambda: None)
    waiters = [Waiter(sink, make_one()) for _ in range(6)]
    sink.set_results(waiters, [REPLY] * 6)
    for waiter in reversed(waiters):  # the last ones are not released yet: they time out, and find their reply
        assert reply_of(waiter, 0) is REPLY
    assert not wakeups
    assert [waiter.done() for waiter in waiters[:2]] == [False, False]


def test_a_chain_that_does_not_go_on_is_given_up(make_one: Callable[[], Waker]) -> None:
    sink, _ = sink_and_wakeups(lambda: None)
    waiters = [Waiter(sink, make_one()) for _ in range(6)]
    sink.set_results(waiters, [REPLY] * 6)
    sink.wake_all()
    for waiter in waiters:
        assert reply_of(waiter) is REPLY


def test_a_used_waiter_waits_again(make_one: Callable[[], Waker]) -> None:
    sink, wakeups = sink_and_wakeups(lambda: None)
    waiter = Waiter(sink, make_one())
    for _ in range(3):
        sink.set_exceptions([waiter], [ArithmeticError("no")])
        with pytest.raises(ArithmeticError):
            reply_of(waiter)
        with_reply = TensorDict({})
        sink.set_results([waiter], [with_reply])
        assert reply_of(waiter) is with_reply
    with pytest.raises(TimeoutError):
        waiter.wait(0)
    assert waiter.done()
    sink.set_results([waiter], [REPLY])
    assert not wakeups


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


def test_a_waker_wakes_the_one_that_waits_or_the_next(make_one: Callable[[], Waker]) -> None:
    waker = make_one()
    assert not waker.wait(0)
    assert not waker.wait(0.001)
    waker.notify()
    waker.notify()
    assert waker.wait(None)
    assert not waker.wait(-1)
    thread = threading.Thread(target=waker.notify)
    thread.start()
    assert waker.wait(1e30)
    thread.join()


def test_a_lock_serves_where_file_descriptors_have_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.eventfd", fail, raising=False)
    assert isinstance(make_waker(), LockWaker)
    monkeypatch.delattr("os.eventfd")
    assert isinstance(make_waker(), LockWaker)


def test_a_waiter_whose_reply_came_just_as_it_gave_up_is_ready_for_the_next_one() -> None:
    sink, _ = sink_and_wakeups(lambda: None)

    class LateWaker(LockWaker):
        def wait(self, timeout: float | None) -> bool:
            waiter.settle(REPLY, None)
            return False

    waiter = Waiter(sink, LateWaker())
    for _ in range(2):
        assert reply_of(waiter, 0) is REPLY
        assert not waiter.done()
