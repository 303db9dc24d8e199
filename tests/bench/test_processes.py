"""The loads that the benchmark makes from other processes."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from aioinfer.bench import runner
from aioinfer.bench.measure import MultiplexedCaller, reply_rate, run_callers
from aioinfer.bench.models import Policy
from aioinfer.bench.peer_process import Pipe
from aioinfer.bench.report import Figures
from aioinfer.bench.workloads import RequestKind, System
from aioinfer.testing import eventually
from tests.bench.parts import BY_NAME, job

# -- whole measurements --------------------------------------------------------------------------------


def measured(system: System, *names_and_ways: tuple[str, str]) -> list[Figures]:
    """Of processes of their own: what is measured here forks, and pytest has threads."""
    found: list[Figures] = []
    for outcome in runner.measure_in_turn([job(name, system, way) for name, way in names_and_ways]):
        assert not isinstance(outcome, runner.MeasurementError), str(outcome)
        found.append(outcome)
    return found


def test_ours_is_measured_with_callers_in_other_processes() -> None:
    *rates, kinds, rows, both, one = measured(
        System.OURS,
        ("processes-4-pickles", "pickles"),
        ("processes-images", "process slots"),
        ("processes-2x64-named", "process slots"),
        ("rows-2x2x64", "process slots"),
        ("slow-processes-8", "process slots"),
        ("process-one", "process slots"),
    )
    assert all(set(found) == {"rate"} and found["rate"] > 0 for found in rates)
    assert set(kinds) == {"array rate", "tensor rate", "reused rate"}
    assert rows["pass rate"] > 0 < rows["rate"]
    assert set(both) == {"rate", "p50", "p99", "count"}
    assert set(one) == {"p50", "p99", "count"}


@pytest.mark.skipif(find_spec("torchrl") is None, reason="torchrl is not installed")
def test_torchrl_is_measured_with_callers_in_other_processes() -> None:
    ways = BY_NAME["processes-2x16"].torchrl
    found = measured(System.TORCHRL, ("processes-4-pickles", "pickles"), *(("processes-2x16", way) for way in ways))
    assert len(found) == 3
    assert all(figures["rate"] > 0 for figures in found)


_KILLED = """
import os, signal, threading
from aioinfer.bench.peer_process import PeerProcess

def hang(pipe):
    pipe.send("ready")
    threading.Event().wait()

peers = [PeerProcess(hang, fork=True) for _ in range(3)]
print(*(peer.pid for peer in peers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_measurement_leaves_no_process_behind_although_its_callers_hang() -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED], stdout=subprocess.PIPE, text=True, check=False)
    pids = [int(pid) for pid in killed.stdout.split()]
    assert len(pids) == 3
    eventually(lambda: not any(map(runs, pids)))


def runs(pid: int) -> bool:
    """Whether a process is there, and is more than an entry that nobody has collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended before it could be opened, or be read
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return not Path("/proc/self").exists()


# -- one of the processes ------------------------------------------------------------------------------


def ask(pipe: Pipe, client: Callable[[Any], Any]) -> None:
    """As another process would, of a system whose clients block."""
    theirs = job("processes-4", System.TORCHRL, "process slots")
    turns = replace(BY_NAME["processes-4"], request_kinds=(RequestKind.REUSED, RequestKind.FRESH))
    run_callers(pipe, theirs, turns, Policy("mlp"), [client])


def test_a_process_counts_its_replies_whenever_asked_and_makes_requests_from_each_beginning_to_its_end() -> None:
    reply = Policy("mlp").reply()
    ours, theirs = multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, theirs, lambda request: reply)
        assert ours.recv() == "ready"
        for _ in range(8):  # turns
            ours.send("begin")
            assert ours.recv() == "begun"
            ours.send("count")
            earlier, fewer, _ = ours.recv()
            more = fewer
            while more == fewer:
                ours.send("count")
                later, more, _ = ours.recv()
                assert later > earlier
            assert more > fewer
            ours.send("end")
            assert ours.recv() == "ended"
        asking.result()
    assert reply_rate((10.0, 3, []), (12.0, 7, [])) == 2.0


def test_a_process_that_gets_a_wrong_reply_does_not_begin() -> None:
    ours, theirs = multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, theirs, lambda request: TensorDict({"action": torch.zeros(3)}))
        ours.send("begin")
        with pytest.raises(RuntimeError, match=r"the action has shape \[3\], expected \[8\]"):
            asking.result()
    assert ours.recv() == "ready"
    assert not ours.poll()


class Client:
    """Answers with its name and how many requests it has had."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self._name = name
        self._asked = asked

    def submit(self, request: object) -> Future[str]:
        self._asked.append(self._name)
        future: Future[str] = Future()
        future.set_result(f"{self._name}{self._asked.count(self._name)}")
        return future


@pytest.mark.parametrize(
    ("rounds", "asked"),
    [(False, ["abca", "abcab", "abcabc", "abcabca"]), (True, ["abc", "abc", "abc", "abcabc"])],
)
def test_callers_in_one_thread_get_one_reply_a_call_and_ask_again_in_turn_or_in_rounds(
    rounds: bool, asked: list[str]
) -> None:
    log: list[str] = []
    caller = MultiplexedCaller([Client(name, log) for name in "abc"], rounds=rounds)
    seen = [(caller("td"), "".join(log)) for _ in range(4)]
    assert [reply for reply, _ in seen] == ["a1", "b1", "c1", "a2"]
    assert [so_far for _, so_far in seen] == asked


def test_a_group_of_environments_steps_before_its_next_request_while_the_other_waits_for_its_reply() -> None:
    log: list[str] = []

    def step(request: str, reply: str) -> None:
        log.append(f"{request} {reply} ")

    caller = MultiplexedCaller([Client(name, log) for name in "ab"], rounds=False, step=step)
    assert [caller("td") for _ in range(3)] == ["a1", "b1", "a2"]
    assert "".join(log) == "abtd a1 atd b1 btd a2 a"


def test_a_model_that_sees_is_asked_with_images() -> None:
    policy = Policy("cnn")
    request = policy.request()["observation"]
    assert request.shape == (3, 84, 84)
    assert request.dtype is torch.uint8
    replies = policy.module(policy.request(2))["action"]
    assert replies.shape == (2, *policy.reply()["action"].shape)
    policy.check(policy.reply())
