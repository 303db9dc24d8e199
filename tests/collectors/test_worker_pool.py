"""Workers: what reaches them and comes back, how they end, and what is left of them."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from aioinfer.collectors.worker_pool import WorkerPool
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.testing import eventually
from tests.collectors.worker_hosts import Config, Homesick, Host, Raising, Slow, Stop
from tests.effort import Effort
from tests.leftovers import assert_no_descriptor_stays, is_there, needs_descriptors
from tests.limits import HANG, IMPORTS
from tests.programs import running


class Workers:
    """A pool, and what it has said of each worker, in order."""

    def __init__(self, host: Callable[..., Any] = Host) -> None:
        self.news: dict[int, queue.SimpleQueue[Any]] = {}
        self.threads: set[threading.Thread] = set()
        self.ticks: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.wanted: float | None = None
        self.pool = WorkerPool(on_message=self.note, on_exit=self.note_exit, on_tick=self.tick, host=host, stop=Stop())

    def note(self, index: int, news: Any) -> None:
        self.threads.add(threading.current_thread())
        if news == ("echo", "an error, please"):
            raise ValueError("this message is not welcome")
        self.news[index].put(news)

    def note_exit(self, index: int, text: str) -> None:
        self.note(index, f"exit: {text}")

    def tick(self, now: float) -> float | None:
        self.ticks.put(now)
        return self.wanted

    def launch(self, index: int, factories: dict[int, Callable[[], Any]] | None = None) -> None:
        self.news.setdefault(index, queue.SimpleQueue())
        self.pool.launch(index, Config(factories or {}))

    def hear(self, index: int = 0) -> Any:
        return self.news[index].get(timeout=IMPORTS)

    def launched(self, index: int = 0) -> int:
        """Launch a worker, and return its process."""
        self.launch(index)
        assert self.hear(index) == ("made", {})
        self.pool.send(index, ("say_how_it_is", None))
        pid = self.hear(index)[1][0]
        assert isinstance(pid, int)
        return pid

    def is_silent(self) -> bool:
        return all(news.empty() for news in self.news.values())


@contextmanager
def workers(host: Callable[..., Any] = Host) -> Iterator[Workers]:
    made = Workers(host)
    made.pool.start()
    try:
        yield made
    finally:
        made.pool.close(0.0)


def double(number: int) -> Callable[[], int]:
    return lambda: 2 * number


class Seven:
    def method(self) -> int:
        return 7


def test_messages_and_memory_reach_a_host_in_order_and_its_own_come_back() -> None:
    def content(at: int) -> bytes:
        return at.to_bytes(8, "little")

    memory = [AnonymousSharedMemory.create(8) for _ in range(6)]
    for at, segment in enumerate(memory):
        segment.write(content(at), 0)
    large = os.urandom(1 << 20)
    with workers() as made:
        made.launch(0, {3: double(4), 5: lambda: "lambda", 6: Seven().method})
        # Before the process is there, and more than its socket takes.
        made.pool.send(0, ("read", 8), [memory[0].fd])
        made.pool.send(0, ("echo", large))
        made.pool.send(0, ("read", 8), [segment.fd for segment in memory[1:5]])
        made.pool.send(0, ("echo", "between"))
        made.pool.send(0, ("read", 8), [memory[5].fd])
        heard = [made.hear() for _ in range(6)]
        assert ("made", {3: 8, 5: "lambda", 6: 7}) in heard  # which any thread may say in between
        heard.remove(("made", {3: 8, 5: "lambda", 6: 7}))
        assert heard == [
            ("read", [content(0)]),
            ("echo", large),
            ("read", [content(at) for at in range(1, 5)]),
            ("echo", "between"),
            ("read", [content(5)]),
        ]
        for _ in range(2):  # at once, too
            made.pool.send(0, ("read", 8), [memory[3].fd, memory[2].fd])
            assert made.hear() == ("read", [content(3), content(2)])
        with pytest.raises(ValueError, match="4 descriptors, not 6"):
            made.pool.send(0, ("read", 8), [segment.fd for segment in memory])
        made.pool.send(0, Stop())
        assert made.hear() == "exit: exit code 0"
        made.pool.send(0, ("echo", "to nobody"))
        made.pool.send(7, ("echo", "to nobody"))
    assert made.is_silent()
    assert [thread.name for thread in made.threads] == ["aioinfer-collector"]


ENDS = {
    "exit code 0": (100, "exit", 0),
    "exit code 3": (100, "exit", 3),
    "killed by SIGKILL": (100, "signal", signal.SIGKILL),
    "killed by SIGTERM": (0, "signal", signal.SIGTERM),
    "killed by SIGSEGV": (100, "segfault", 0),
    "ValueError: the host gives up": (100, "raise", 0),
}


def test_every_end_is_reported_once_after_all_messages() -> None:
    with workers() as made:
        for index, end in enumerate(ENDS.values()):
            made.launch(index)
            made.pool.send(index, ("count_and", end))
        for index, (text, (count, *_)) in enumerate(ENDS.items()):
            heard = [made.hear(index)]
            while not isinstance(heard[-1], str):
                heard.append(made.hear(index))
            *messages, ending = heard
            assert [number for word, number in messages if word == "number"] == list(range(count))
            assert ending.startswith("exit: ")
            assert ending.rstrip().endswith(text)
    assert made.is_silent()


def test_a_worker_is_started_again_from_the_callback_of_its_exit() -> None:
    exits: list[tuple[int, str]] = []

    class Restarted(Workers):
        def note_exit(self, index: int, text: str) -> None:
            exits.append((index, text))
            if len(exits) < 4:
                self.launch(index)

    made = Restarted()
    made.pool.start()
    made.launch(1)
    with pytest.raises(RuntimeError, match="worker 1 runs"):
        made.launch(1)
    for _ in range(3):
        assert made.hear(1) == ("made", {})
        made.pool.kill(1)
    assert made.hear(1) == ("made", {})
    made.pool.send(1, Stop())
    made.pool.close(HANG)
    assert exits == [(1, "killed by SIGKILL")] * 3 + [(1, "exit code 0")]


@pytest.mark.parametrize(
    ("host", "text"),
    [
        (Raising, "LookupError: no environment of this name"),
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_host_that_can_not_be_made_says_why(host: Callable[..., Any], text: str) -> None:
    with workers(host) as made:
        made.launch(0)
        ending = made.hear()
        assert ending.startswith("exit: failed:\n\nTraceback")
        assert text in ending
    assert made.is_silent()


def test_a_factory_of_a_module_that_a_worker_does_not_find_is_named() -> None:
    with workers() as made:
        made.launch(0, {0: Homesick()})
        assert "ImportError: this is not home" in made.hear()


@pytest.mark.parametrize("has_cloudpickle", [True, False])
def test_a_factory_that_does_not_pickle_is_named(has_cloudpickle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    factories: dict[int, Callable[[], Any]] = {0: Seven().method, 4: lock.locked}
    if not has_cloudpickle:
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
        factories = {0: Seven().method, 4: double(1)}
    with workers() as made:
        with pytest.raises(TypeError, match=r"the factory of environment 4, <.*>, can't be sent to a worker") as raised:
            made.launch(0, factories)
        assert ("with cloudpickle installed" in str(raised.value)) is not has_cloudpickle
        made.launch(0, {0: Seven().method})
        assert made.hear() == ("made", {0: 7})


def test_a_worker_whose_message_raises_is_killed() -> None:
    with workers() as made:
        made.launched()
        made.pool.send(0, ("echo", "an error, please"))
        assert "ValueError: this message is not welcome" in made.hear()
        made.launched()
        made.pool.send(0, ("send_what_does_not_arrive", None))
        assert "ImportError: this is not home" in made.hear()


def test_a_worker_ignores_ctrl_c_and_computes_on_one_thread() -> None:
    with workers() as made:
        pid = made.launched()
        os.kill(pid, signal.SIGINT)
        made.pool.send(0, ("say_how_it_is", None))
        assert made.hear()[1] == (pid, signal.SIG_IGN, signal.SIG_DFL, 1)


def test_time_goes_on_while_nothing_happens() -> None:
    made = Workers()
    made.wanted = 0.001
    made.pool.start()
    seen = [made.ticks.get(timeout=HANG) for _ in range(20)]
    made.wanted = None
    assert seen == sorted(seen)
    ran = threading.Event()
    made.pool.call_soon(ran.set)
    assert ran.wait(HANG)
    made.pool.close(HANG)


# -- closing -----------------------------------------------------------------------------------------------


def test_closing_waits_for_workers_that_end_by_themselves() -> None:
    with workers() as made:
        pid = made.launched()
        made.launched(1)
        for index in range(2):
            made.pool.send(index, Stop())
        made.pool.close(HANG)
        assert [made.hear(index) for index in range(2)] == ["exit: exit code 0"] * 2
        assert not is_there(pid)
        made.pool.close(HANG)
        made.launch(0)  # too late
        with pytest.raises(RuntimeError, match="closed"):
            made.pool.start()
    assert made.is_silent()


def test_closing_kills_what_does_not_end() -> None:
    with workers() as made, workers(Slow) as slow:
        for index, how in enumerate(["with the GIL", "without"]):
            made.launched(index)
            made.pool.send(index, ("hang", how))
            assert made.hear(index)[0] == "hanging"
        stopped = made.launched(2)
        os.kill(stopped, signal.SIGSTOP)
        slow.launch(0)
        assert slow.hear()[0] == "making"
        for pool in (made.pool, slow.pool):
            pool.call_soon(lambda pool=pool: pool.close(0.1))  # type: ignore[misc]
        for pool in (made.pool, slow.pool):
            pool.close(HANG)
        assert [made.hear(index) for index in range(3)] == ["exit: killed by SIGKILL"] * 3
        assert slow.hear() == "exit: killed by SIGKILL"
        assert not is_there(stopped)


@needs_descriptors
def test_pools_leave_no_descriptor_behind() -> None:
    def cycle() -> None:
        with workers() as made:
            made.launched()
            made.launch(1)  # which is killed at any moment of its start
        unstarted = Workers()
        unstarted.launch(0)
        unstarted.pool.send(0, Stop())
        unstarted.pool.close(HANG)
        unstarted.pool.close(0.0)

    assert_no_descriptor_stays(cycle, 4)


# -- a parent that is killed -------------------------------------------------------------------------------

PROGRAM = """
import signal, sys
from tests.collectors.test_worker_pool import Workers

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where it is ignored, as under nohup, orphans are killed at once
    workers = Workers()
    workers.pool.start()
    pids = [workers.launched(index) for index in range(3)]
    for index, how in enumerate(["with the GIL", "without"]):
        workers.pool.send(index, ("hang", how))
        workers.hear(index)
    workers.pool.send(2, ("note_the_end", sys.argv[1]))
    workers.hear(2)
    print(*pids, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("ending", ["killed", pytest.param("ended", marks=pytest.mark.stress)])
def test_no_worker_outlives_its_parent_and_one_that_can_closes_its_environments(ending: str, tmp_path: Path) -> None:
    program, note = tmp_path / "program.py", tmp_path / "note"
    program.write_text(PROGRAM)
    with running(program, str(note)) as process:
        pids = process.stdout.readline().split()
        assert len(pids) == 3, process.errors
        if ending == "killed":
            process.kill()
        else:
            process.stdin.close()
        process.wait(HANG)
        eventually(lambda: not any(is_there(int(pid)) for pid in pids))
    if ending == "killed":  # else its parent has killed it
        assert note.read_text() == "told to end"


# -- the fork server ---------------------------------------------------------------------------------------

IMPORTING = """
import multiprocessing, sys
from tests.collectors.test_worker_pool import Workers

if __name__ == "__main__":
    if "own" in sys.argv:
        multiprocessing.set_forkserver_preload(["zipapp"])
    else:
        import gymnasium
    workers = Workers()
    workers.pool.start()
    workers.launched()
    workers.pool.send(0, ("have_a_child", None))
    print(workers.hear()[1], flush=True)
    workers.pool.send(0, ("say_what_is_imported", ["zipapp", "gymnasium"]))
    print(*workers.hear()[1], flush=True)
"""


@pytest.mark.stress
@pytest.mark.parametrize(("whose", "imported"), [("own", "zipapp"), ("ours", "gymnasium")])
def test_a_fork_server_imports_what_the_program_says_or_else_what_it_has_and_workers_need(
    whose: str, imported: str, tmp_path: Path
) -> None:
    pytest.importorskip("gymnasium")
    program = tmp_path / "program.py"
    program.write_text(IMPORTING)
    with running(program, whose) as process:
        assert process.stdout.readline().strip() == "0", process.errors
        assert process.stdout.readline().strip() == imported, process.errors
        process.stdin.close()
        assert process.wait(HANG) == 0


# -- stress ------------------------------------------------------------------------------------------------


def test_workers_that_are_killed_at_any_moment_come_back(effort: Effort) -> None:
    moments = effort.random()
    with workers() as made:
        pids = {index: made.launched(index) for index in range(2)}
        for _ in range(effort.times(6, stress=200)):
            index = moments.randrange(2)
            made.pool.send(index, ("count_and", (moments.randrange(3000), "no", 0)))
            time.sleep(moments.random() * 0.01)
            if moments.random() < 0.5:
                with suppress(ProcessLookupError):
                    os.kill(pids[index], signal.SIGKILL)
            else:
                made.pool.kill(index)
            numbers = []
            while not isinstance(news := made.hear(index), str):
                numbers.append(news[1])
            assert numbers == list(range(len(numbers)))
            assert news == "exit: killed by SIGKILL"
            if moments.random() < 0.3:  # while it starts
                made.launch(index)
                time.sleep(moments.random() * 0.1)
                made.pool.kill(index)
                while not isinstance(news := made.hear(index), str):
                    pass
                assert news in ("exit: killed by SIGKILL", "exit: was ended before it was started")
            pids[index] = made.launched(index)
