"""A start that fails or is interrupted, a pause, a fork, and an event loop that ends."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aioinfer import CollectorError
from aioinfer.collectors import AsyncBatchedCollector, Restarts
from aioinfer.collectors import coordinator as coordinator_module
from aioinfer.testing import eventually
from aioinfer.testing.inspection import look_for_late_calls
from tests.collectors.worlds import Gate, World, make_policy
from tests.limits import HANG


def make_collector(make: Any, **options: Any) -> AsyncBatchedCollector:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 32, "fragment_length": 8}
    return AsyncBatchedCollector(make, **{**settings, **options})


def take(collector: AsyncBatchedCollector, count: int) -> int:
    return sum(1 for _ in itertools.islice(collector, count))


class Closing(World):
    """Says when it is closed."""

    def __init__(self, closed: threading.Semaphore) -> None:
        super().__init__()
        self.closed = closed

    def close(self) -> None:
        self.closed.release()


# -- start -------------------------------------------------------------------------------------------------


def fail_to_make() -> Any:
    raise OSError("no camera")


@pytest.mark.parametrize("options", [{"min_envs": 3}, {"policy": lambda td: td}], ids=["environment", "policy"])
def test_a_start_that_fails_closes_the_environments_that_were_made(options: dict[str, Any]) -> None:
    closed = threading.Semaphore(0)
    makes = [lambda: Closing(closed), lambda: Closing(closed), fail_to_make]
    collector = make_collector(makes, restarts=None, **options)
    with pytest.raises((CollectorError, ValueError)):
        collector.start()
    assert closed.acquire(timeout=HANG)
    assert closed.acquire(timeout=HANG)
    assert collector.stats().frames == 0


def test_a_start_without_threads_for_the_groups_closes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    start, closed = threading.Thread.start, threading.Semaphore(0)

    def fail(thread: threading.Thread) -> None:
        if thread.name == "aioinfer-group":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        make_collector([lambda: Closing(closed)] * 2).start()
    assert closed.acquire(timeout=HANG)
    assert closed.acquire(timeout=HANG)


def test_a_signal_handler_may_shut_down_a_collector_that_starts() -> None:
    gate, closed = Gate(), threading.Semaphore(0)

    def hang() -> Any:
        gate.pass_through()
        return Closing(closed)

    def interrupt() -> None:
        gate.reached.wait()
        os.kill(os.getpid(), signal.SIGUSR1)

    collector = make_collector([lambda: Closing(closed), hang])
    before = signal.signal(signal.SIGUSR1, lambda *_: collector.shutdown(1.0))
    killer = threading.Thread(target=interrupt)
    killer.start()
    try:
        with pytest.raises(RuntimeError, match="shut down"):
            collector.start()
    finally:
        signal.signal(signal.SIGUSR1, before)
        gate.open.set()
        killer.join()
    # The one that was made, and the one whose factory returns when nobody waits for it any more.
    assert closed.acquire(timeout=HANG)
    assert closed.acquire(timeout=HANG)


def test_the_time_to_make_an_environment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(time.monotonic(), 300.0)  # in which the machine's own seconds are few
    now = next(clock)
    monkeypatch.setattr(coordinator_module, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))

    def make() -> Any:
        nonlocal now
        now = next(clock)
        look_for_late_calls(collector, now)
        return World()

    collector = make_collector([make] * 6, reset_timeout=1000.0, restarts=None)
    with collector:
        monkeypatch.undo()
        take(collector, 2)
        assert collector.stats().timeouts == 0


# -- workers -----------------------------------------------------------------------------------------------


class Failing(World):
    def step(self, action: Any) -> Any:
        raise ArithmeticError("this environment has had enough")


class Killed(World):
    """Kills its process in a step, the first time, once another one is retired."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.left = 0 if path.exists() else 100
        path.touch()

    def step(self, action: Any) -> Any:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def test_a_worker_with_fewer_environments_than_before_begins_again(tmp_path: Path) -> None:
    makes: list[Callable[[], Any]] = [Failing, lambda: Killed(tmp_path / "made"), World, World]
    # One restart each: the first environment is retired for its second failure.
    options: dict[str, Any] = {"num_workers": 1, "groups_per_worker": 3, "restarts": Restarts(lifetime=1)}
    with make_collector(makes, **options) as collector:
        assert take(collector, 25) == 25
        stats = collector.stats()
    assert set(stats.retired) == {0}
    assert stats.restarts == dict.fromkeys(range(4), 1)


def test_a_worker_without_environments_does_not_keep_a_pause() -> None:
    with make_collector([fail_to_make, World], num_workers=2, restarts=None) as collector:
        take(collector, 1)
        with collector.pause(HANG):
            pass
        assert take(collector, 3) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_forked_child_leaves_the_collector_alone(num_workers: int) -> None:
    with make_collector([World] * 2, num_workers=num_workers) as collector:
        take(collector, 1)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            collector.shutdown()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert take(collector, 20) == 20
        assert not collector.stats().restarts


# -- pause -------------------------------------------------------------------------------------------------


class Counting(World):
    """Counts its steps, and waits in one of them."""

    def __init__(self, gate: Gate | None = None, at: int = 5) -> None:
        super().__init__()
        self.gate, self.at, self.steps = gate, at, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.gate is not None and self.steps == self.at:
            self.gate.pass_through()
        return super().step(action)


def test_a_pause_within_a_pause_does_not_end_it() -> None:
    env = Counting()
    with make_collector([env], overflow="drop_oldest") as collector:
        take(collector, 1)
        with collector.pause(HANG):
            with collector.pause(HANG):
                before = env.steps
            with collector.pause(HANG):  # a group that went on would have made steps by now, or makes them now
                pass
            assert env.steps == before
        take(collector, 5)


def test_a_pause_after_one_that_was_given_up_waits_for_every_group() -> None:
    gates = Gate(), Gate()
    envs = [Counting(gate) for gate in gates]
    with make_collector(envs, frames_per_batch=16, groups_per_worker=2) as collector:
        try:
            for gate in gates:
                assert gate.reached.wait(HANG)
            with pytest.raises(TimeoutError), collector.pause(0.01):
                pass
            gates[0].open.set()
            with pytest.raises(TimeoutError), collector.pause(0.5):
                pass
        finally:
            for gate in gates:
                gate.open.set()


# -- readers and event loops -------------------------------------------------------------------------------


def test_a_reader_gets_no_error_where_the_collector_is_shut_down_between_two_batches() -> None:
    collector: AsyncBatchedCollector = make_collector([World] * 2, post_collect_hook=lambda _: collector.shutdown())
    assert take(collector, 5) == 1


class Awaited:
    """An asynchronous environment that is cancelled from the inside in one of its steps."""

    def __init__(self, cancelled_at: int = 0) -> None:
        self.world, self.left = World(), cancelled_at
        self.observation_space, self.action_space = self.world.observation_space, self.world.action_space

    async def reset(self, *, seed: int | None = None) -> Any:
        return self.world.reset(seed=seed)

    async def step(self, action: Any) -> Any:
        await asyncio.sleep(0)
        self.left -= 1
        if not self.left:
            raise asyncio.CancelledError
        return self.world.step(action)


async def test_an_environment_whose_own_task_was_cancelled_is_made_again() -> None:
    made = itertools.count()
    makes = [lambda: Awaited(0 if next(made) else 20), Awaited]
    async with make_collector(makes) as collector:
        count = 0
        async for _ in collector:
            count += 1
            if count == 10:
                break
        assert set(collector.stats().restarts) == {0}


def test_the_end_of_the_event_loop_is_an_error_for_who_reads_on() -> None:
    collector = make_collector([Awaited] * 2)

    async def read_one() -> None:
        await collector.__aenter__()
        async for _ in collector:
            break

    asyncio.run(read_one())
    with pytest.raises(RuntimeError, match="was cancelled"):
        take(collector, 100)
    collector.shutdown()


def test_a_collector_that_nobody_has_any_more_ends() -> None:
    collector = AsyncBatchedCollector(World, policy=make_policy(), num_envs=2, frames_per_batch=64, fragment_length=8)
    next(iter(collector))

    def is_over() -> bool:
        gc.collect()  # again, since one of its threads may just have had it in hand
        return not [thread for thread in threading.enumerate() if thread.name.startswith("aioinfer")]

    del collector
    eventually(is_over)


def test_there_is_one_reader_at_a_time() -> None:
    go_on = threading.Event()

    class Waiting(World):
        def step(self, action: Any) -> Any:
            go_on.wait()
            return super().step(action)

    def read() -> None:
        try:
            outcomes.append(next(iter(collector)) is not None)
        except RuntimeError as error:
            outcomes.append("one reader at a time" in str(error))
            go_on.set()

    outcomes: list[bool] = []
    with AsyncBatchedCollector(Waiting, policy=make_policy(), frames_per_batch=8, fragment_length=8) as collector:
        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(HANG)
    assert go_on.is_set()
    assert outcomes == [True, True]
