"""Trainers and workers in processes of their own: forked, spawned, killed, begun anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import pytest

from aioinfer import InferenceServer, ThreadingTransport, WeightSyncError
from aioinfer.testing import eventually, request
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme
from tests.effort import Effort
from tests.leftovers import assert_no_memory_stays, go_on, is_there
from tests.limits import HANG
from tests.methods import METHODS, SPAWN
from tests.process_workers import hear
from tests.programs import running
from tests.weight_models import (
    SCHEMES,
    follow_always,
    follow_large,
    mark,
    mark_of,
    measure_peak,
    policy,
    run_worker,
    train,
)

Scheme = MultiProcessWeightSyncScheme | SharedMemWeightSyncScheme

pytestmark = pytest.mark.timeout(120)


class Child:
    """A process that is told what to do, and is gone at the end of the test."""

    def __init__(self, method: str, target: Callable[..., None], scheme: Scheme, *arguments: Any) -> None:
        context: Any = multiprocessing.get_context(method)
        self.line: Connection[Any, Any]
        self.line, other = context.Pipe()
        before, after = arguments[:1], arguments[1:]
        self.process: BaseProcess = context.Process(target=target, args=(scheme, *before, other, *after))
        self.process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.line.close()

    def expect(self, word: Any) -> None:
        assert self.hear() == word

    def hear(self) -> Any:
        return hear(self.line)

    def tell(self, order: str) -> Any:
        self.line.send(order)
        return self.hear()

    def freeze(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Iterator[Scheme]:
    made = request.param(timeout=HANG)
    yield made
    made.shutdown()


@pytest.mark.parametrize("method", METHODS)
def test_workers_are_forked_or_spawned_and_get_what_is_sent(scheme: Scheme, method: str) -> None:
    source = policy(1.0)
    scheme.init_on_sender(model=source, num_workers=2)
    with Child(method, run_worker, scheme, 0) as one, Child(method, run_worker, scheme, 1) as other:
        scheme.connect()
        mark(source, -1.0)
        for worker in (one, other):
            worker.expect("ready")
            worker.expect("connected")
            assert worker.tell("mark") == 1
        for value in (2.0, 3.0):
            mark(source, value)
            scheme.send_async()
            mark(source, -1.0)
            assert [worker.tell("receive") for worker in (one, other)] == [True, True]
            scheme.wait_async()
            assert [worker.tell("mark") for worker in (one, other)] == [value, value]


def test_a_worker_that_dies_is_seen_at_once_and_the_others_go_on(scheme: Scheme) -> None:
    scheme.init_on_sender(model=policy(1.0), num_workers=2)
    with Child("fork", follow_always, scheme, 0) as victim, Child("fork", follow_always, scheme, 1) as other:
        scheme.connect()
        for worker in (victim, other):
            worker.expect("ready")
            worker.expect("connected")
        scheme.send()
        victim.freeze()
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(scheme.send, policy(2.0))
            time.sleep(0.05)
            assert not sending.done()
            victim.process.kill()
            with pytest.raises(WeightSyncError, match=r"^worker 0 died$"):
                sending.result(HANG / 2)  # the timeout of the scheme is HANG
        for value in (3.0, 4.0):
            with pytest.raises(WeightSyncError, match=r"^worker 0 died$"):
                scheme.send(policy(value))
            scheme.send(policy(value + 0.5), worker_ids=1)
        assert other.tell("end") == 4.5
        with Child("fork", run_worker, scheme, 0) as successor:
            successor.expect("ready")
            successor.expect("connected")
            assert successor.tell("mark") == 4.0


def test_workers_killed_at_any_moment_change_nothing_for_the_others(scheme: Scheme, effort: Effort) -> None:
    chance = effort.random()
    scheme.init_on_sender(model=policy(0.0), num_workers=2)
    scheme.connect()
    with Child("fork", follow_always, scheme, 1) as other:
        other.expect("ready")
        other.expect("connected")
        for _ in range(effort.times(5, stress=15)):
            with Child("fork", follow_always, scheme, 0) as victim:
                victim.expect("ready")
                threading.Timer(chance.uniform(0, 0.03), victim.process.kill).start()
                with pytest.raises(WeightSyncError, match=r"^worker 0 died$"):
                    send_for_ever(scheme)
        scheme.send(policy(-5.0), worker_ids=1)
        assert other.tell("end") == -5.0


def send_for_ever(scheme: Scheme) -> None:
    for number in count(1):
        scheme.send(policy(float(number)))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_holds_two_copies_at_most_while_workers_get_weights_of_their_own() -> None:
    scheme = MultiProcessWeightSyncScheme(num_workers=4, timeout=HANG)
    with ExitStack() as stack:
        trainer = stack.enter_context(Child("fork", measure_peak, scheme))
        for index in range(4):
            stack.enter_context(Child("fork", follow_large, scheme, index)).expect("ready")
        copies = trainer.hear()
        # One that is made for a worker, and its snapshot. A third one would be a whole one more; what the
        # interpreter itself takes meanwhile is a tenth of one.
        assert 1.5 < copies < 2.5
    scheme.shutdown()


@pytest.mark.parametrize("method", ["fork", SPAWN])
@pytest.mark.parametrize("swap", [False, True])
def test_no_reply_is_torn_while_a_trainer_in_another_process_publishes(
    scheme: Scheme, method: str, swap: bool, effort: Effort
) -> None:
    scheme.init_on_sender(model=policy(0.0))  # makes the queue, before the trainer's process is started
    served = policy(0.0, seconds=0.0005)
    with (
        Child(method, train, scheme) as trainer,
        InferenceServer(served, ThreadingTransport(), weight_sync=scheme, swap_weights=swap) as server,
        ThreadPoolExecutor(20) as pool,
    ):
        trainer.line.send("begin")
        trainer.expect("connected")
        eventually(lambda: server.policy_version > 1)

        def ask() -> set[int]:
            client, seen = server.client(), set()
            for _ in range(effort.times(100, stress=1000)):
                reply = client(request(0), HANG)
                version = int(reply["policy_version"])
                assert mark_of(reply) == version
                seen.add(version)
            return seen

        seen: set[int] = set()
        while len(seen) <= 20:
            seen.update(*[asked.result(HANG) for asked in [pool.submit(ask) for _ in range(20)]])
        published = trainer.tell("end")
        assert max(seen) <= published


def leave_weights_and_end(scheme: Scheme, orders: Connection[Any, Any]) -> None:
    scheme.init_on_sender(model=policy(3.0))
    scheme.connect()


def send_what_a_parent_published(scheme: Scheme, orders: Connection[Any, Any]) -> None:
    try:
        scheme.send()
    except RuntimeError as error:
        orders.send(str(error))


def test_weights_that_a_trainer_leaves_behind_are_found_though_it_is_gone(scheme: Scheme) -> None:
    scheme.init_on_sender(model=policy(0.0))
    with Child("fork", leave_weights_and_end, scheme) as trainer:
        trainer.process.join()
    with InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme) as server:
        eventually(lambda: mark_of(server.client()(request(0), HANG)) == 3)
        assert server.stats().trainer_connected is False


def test_a_process_that_was_forked_from_a_trainer_is_none(scheme: Scheme) -> None:
    scheme.init_on_sender(model=policy(0.0))
    scheme.connect()
    with Child("fork", send_what_a_parent_published, scheme) as child:
        assert "init_on_sender" in child.hear()


def test_trainers_killed_at_any_moment_leave_a_server_that_the_next_one_updates(scheme: Scheme, effort: Effort) -> None:
    chance = effort.random()
    scheme.init_on_sender(model=policy(0.0))
    with ExitStack() as stack:
        # Forked before the server's threads are there.
        trainers = [stack.enter_context(Child("fork", train, scheme)) for _ in range(effort.times(4, stress=12))]
        server = stack.enter_context(InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme))
        client = server.client()
        for trainer in trainers:
            trainer.line.send("begin")
            trainer.expect("connected")
            time.sleep(chance.uniform(0, 0.03))
            trainer.process.kill()
            trainer.process.join()
            eventually(lambda: server.stats().trainer_connected is False)
            mark_of(client(request(0), HANG))
        with Child("forkserver", train, scheme) as trainer:
            trainer.line.send("begin")
            trainer.expect("connected")
            updates = server.stats().weight_updates
            eventually(lambda: server.stats().weight_updates > updates + 5)
            assert server.stats().trainer_connected is True


# -- the end of programs -----------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, os, sys, time
import torch
from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.weight_sync import SharedMemWeightSyncScheme
from tests.weight_models import policy, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    scheme = SharedMemWeightSyncScheme(num_workers=1, timeout=60.0)
    context = multiprocessing.get_context("METHOD")
    line, other = context.Pipe()
    child = context.Process(target=train, args=(scheme, other), daemon=True)
    child.start()
    other.close()
    server = InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme, swap_weights=True).start()
    line.send("begin")
    assert line.recv() == "connected"
    while server.stats().weight_updates < 5:
        time.sleep(0.01)
    print("far enough", flush=True)
    sys.stdin.readline()
    END
"""

ENDS = {
    "it returns": "",
    "it raises": "raise RuntimeError('the end')",
    "it exits": "sys.exit(3)",
    "it is killed": "os.kill(os.getpid(), 9)",
    "its trainer is killed": "os.kill(child.pid, 9); child.join(); server.shutdown()",
    "it shuts down first": "server.shutdown(); scheme.shutdown()",
}


OFTEN = {"it returns", "it is killed", "its trainer is killed"}


@pytest.mark.parametrize("end", [pytest.param(end, marks=[] if end in OFTEN else pytest.mark.stress) for end in ENDS])
@pytest.mark.parametrize("method", ["fork", SPAWN])
def test_a_program_that_ends_leaves_no_process_and_no_memory(end: str, method: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("METHOD", method).replace("END", ENDS[end]))
    with running(program) as process:
        assert process.stdout.readline(), "it did not get that far"
        memory = go_on(process)
        process.wait(HANG)
    eventually(lambda: not is_there(-process.pid))
    assert_no_memory_stays(memory)
