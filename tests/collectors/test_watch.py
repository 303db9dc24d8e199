"""What a watcher sees of groups."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from aioinfer.collectors.watch import ControlBlock, Overdue, Phase, Watch, overdue


def watch_at(since: float, member: int, phase: Phase) -> Watch:
    watch = Watch()
    watch.begin(member, phase)
    watch.since[0] = since
    return watch


def test_a_call_is_overdue_from_its_timeout_on() -> None:
    watches = [
        watch_at(10.0, 0, Phase.STEP),
        watch_at(10.5, 4, Phase.STEP),
        watch_at(5.0, 7, Phase.RESET),
        watch_at(6.5, 9, Phase.MAKE),
        watch_at(0.0, 11, Phase.IDLE),
        watch_at(1.0, 12, Phase.CLOSE),
    ]
    found, again = overdue(watches, 11.0, step_timeout=1.0, reset_timeout=5.0)
    assert found == [
        Overdue(0, 0, Phase.STEP, 1.0),
        Overdue(2, 7, Phase.RESET, 6.0),
        Overdue(5, 12, Phase.CLOSE, 10.0),
    ]
    assert again == pytest.approx(0.5)  # of both the step of member 4 and the making of member 9
    assert overdue(watches, 11.5, step_timeout=1.0, reset_timeout=5.0)[0][1] == Overdue(1, 4, Phase.STEP, 1.0)


def test_a_call_without_a_timeout_is_never_overdue() -> None:
    watches = [watch_at(0.0, 0, Phase.STEP), watch_at(0.0, 1, Phase.RESET)]
    assert overdue(watches, 1e6, step_timeout=None, reset_timeout=None) == ([], None)
    found, again = overdue(watches, 1e6, step_timeout=3.0, reset_timeout=None)
    assert ([late.member for late in found], again) == ([0], 3.0)
    found, again = overdue(watches, 1e6, step_timeout=None, reset_timeout=4.0)
    assert ([late.member for late in found], again) == ([1], 4.0)


def test_nothing_is_overdue_between_calls() -> None:
    watch = Watch()
    assert overdue([watch], time.monotonic(), step_timeout=0.5, reset_timeout=None) == ([], 0.5)
    before = time.monotonic()
    watch.begin(3, Phase.STEP)
    assert before <= watch.since[0] <= time.monotonic()
    late = time.monotonic() + 1.0
    assert [found.member for found in overdue([watch], late, step_timeout=0.5, reset_timeout=None)[0]] == [3]
    watch.end()
    assert overdue([watch], late, step_timeout=0.5, reset_timeout=None) == ([], 0.5)


def test_another_process_sees_what_each_group_writes() -> None:
    mine = ControlBlock(3, 5)
    assert mine.memory is not None
    other = ControlBlock(3, 5, descriptor=os.dup(mine.memory.fd))
    for group, watch in enumerate(mine.watches):
        watch.begin(10 + group, Phase.RESET)
        watch.frames[0] += group
        watch.seconds[:] = np.arange(3) + group / 2
    mine.episodes[:] = np.arange(5)
    for group, watch in enumerate(other.watches):
        assert (watch.member[0], watch.phase[0], watch.frames[0]) == (10 + group, Phase.RESET, group)
        assert watch.since[0] == mine.watches[group].since[0]
        assert watch.seconds.tolist() == [group / 2, 1 + group / 2, 2 + group / 2]
    assert other.episodes.tolist() == [0, 1, 2, 3, 4]
    assert other.episodes.dtype == np.int64


def test_a_table_of_one_process_takes_no_descriptor() -> None:
    block = ControlBlock(2, 3, shared=False)
    assert block.memory is None
    block.watches[1].begin(1, Phase.STEP)
    assert [int(watch.phase[0]) for watch in block.watches] == [Phase.IDLE, Phase.STEP]
    assert block.episodes.tolist() == [0, 0, 0]
