"""Which environment writes which row of the ring, and which fragments are a batch, with any paces and any trouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aioinfer.collectors.scheduler import FragmentScheduler, Overflow


def scheduler(num_envs: int = 3, batch_rows: int = 2, fragment_length: int = 4, **options: Any) -> FragmentScheduler:
    return FragmentScheduler(num_envs=num_envs, batch_rows=batch_rows, fragment_length=fragment_length, **options)


@dataclass
class Fragment:
    env: int
    number: int  # of this environment's fragments that have steps
    length: int
    version: int | None


class World:
    """Environments, a reader and a ring as the scheduler's callers see them, and what must never happen."""

    def __init__(self, **options: Any) -> None:
        self.scheduler = scheduler(**options)
        self.num_envs: int = options["num_envs"]
        self.length: int = options["fragment_length"]
        self.batch_rows: int = options["batch_rows"]
        self.ahead: int = options["max_batches_ahead"]
        self.fair = options.get("order", "fair") == "fair"
        self.lag: int | None = options.get("max_policy_lag")
        self.episodes: bool = options.get("episodes", False)
        total = options.get("total_frames")
        self.total: int | None = None if self.episodes else total
        self.version = 0
        self.there = set(range(self.num_envs))
        self.asked: set[int] = set()
        self.granted: list[list[int]] = [[] for _ in range(self.num_envs)]  # rows being written, by environment
        self.grants = [0] * self.num_envs
        self.finished = [0] * self.num_envs
        self.has_left: set[int] = set()
        self.written = [0] * self.num_envs  # fragments with steps
        self.unread: dict[int, Fragment] = {}  # by row; what was dropped is found out as the row is granted again
        self.lent: list[int] = []
        self.delivered: list[Fragment] = []
        self.frames = 0

    def ask(self, env: int) -> None:
        self.asked.add(env)
        self.scheduler.ask(env)

    def grant(self) -> list[tuple[int, int]]:
        granted = self.scheduler.grants()
        for env, row in granted:
            assert 0 <= row < self.scheduler.num_rows
            assert env in self.asked
            self.asked.remove(env)
            assert row not in self.lent
            assert all(row not in rows for rows in self.granted)
            self.unread.pop(row, None)
            self.granted[env].append(row)
            self.grants[env] += 1
        if self.fair:
            self.check_pace()
        return granted

    def check_pace(self) -> None:
        never_left = [env for env in range(self.num_envs) if env not in self.has_left]
        if never_left:
            slowest = min(self.finished[env] for env in never_left)
            fastest = max(self.grants[env] for env in never_left)
            assert fastest - 1 - slowest <= self.ahead

    def finish(self, env: int, length: int, version: int | None) -> None:
        row = self.granted[env].pop(0)
        self.scheduler.finish(env, row, length, version)
        self.finished[env] += 1
        if length:
            self.unread[row] = Fragment(env, self.written[env], length, version)
            self.written[env] += 1

    def work(self, env: int, version: int | None, asks_early: bool) -> None:
        """Let ``env`` ask for its next row, and finish the one that it writes."""
        if env not in self.asked and len(self.granted[env]) < 1 + asks_early:
            self.ask(env)
        self.grant()
        if self.granted[env]:
            self.finish(env, self.length, version)

    def leave(self, env: int, length: int, leaves_first: bool) -> None:
        self.there.remove(env)
        self.asked.discard(env)
        self.has_left.add(env)
        if leaves_first:
            self.scheduler.leave(env)
        while self.granted[env]:
            self.finish(env, length, self.version)
            length = 0  # of the row that was granted before it was needed
        self.scheduler.leave(env)

    def join(self, env: int) -> None:
        self.there.add(env)
        self.scheduler.join(env)

    def release(self) -> None:
        self.scheduler.release(self.lent)
        self.lent = []

    def take(self) -> bool:
        self.scheduler.request()
        taken = self.scheduler.take(self.version)
        if taken is None:
            return False
        fragments = []
        for row, env, length in taken:
            fragment = self.unread.pop(row)
            assert fragment.env == env
            assert fragment.length == length or (length < fragment.length and self.scheduler.finished)
            if self.lag is not None and not self.episodes and fragment.version is not None:
                assert fragment.version >= self.version - self.lag
            fragments.append(fragment)
            self.frames += length
        self.lent += [row for row, _, _ in taken]
        self.delivered += fragments
        assert self.frames == self.scheduler.frames
        assert self.total is None or self.frames <= self.total
        assert self.scheduler.finished == (self.frames == self.total)
        if not self.scheduler.finished and not self.episodes:
            assert len(taken) == self.batch_rows
        for env in range(self.num_envs):
            numbers = [fragment.number for fragment in self.delivered if fragment.env == env]
            assert numbers == sorted(set(numbers))
        return True

    def go_on(self) -> None:
        """Let all environments step until a batch more has come, while one is lent. Nothing may stop that."""
        for env in set(range(self.num_envs)) - self.there:
            self.join(env)
        for _ in range(10 + 4 * self.scheduler.num_rows):
            for env in range(self.num_envs):
                self.work(env, self.version, asks_early=True)
            lent = self.lent
            if self.episodes:
                self.release()
            if self.take() or self.scheduler.finished:
                if not self.episodes:
                    self.scheduler.release(lent)
                    self.lent = [row for row in self.lent if row not in lent]
                return
        raise AssertionError("no batch has come")

    def go_on_unread(self) -> None:
        """Let all environments step until the oldest batch is dropped. A reader that is away may not stop that."""
        dropped = self.scheduler.dropped_batches
        for _ in range(10 + 4 * self.scheduler.num_rows):
            for env in range(self.num_envs):
                self.work(env, self.version, asks_early=True)
            if self.scheduler.dropped_batches > dropped or self.scheduler.finished:
                return
        raise AssertionError("no batch was dropped")

    def drain(self) -> None:
        """Let all environments go, read what is there, and account for all that was written."""
        for env in list(self.there):
            self.leave(env, self.length, leaves_first=False)
        while self.take():
            self.release()
        self.join(0)
        for _ in range(self.batch_rows):
            if self.scheduler.finished:
                return
            self.work(0, self.version, asks_early=False)
            if self.take():
                break
        dropped = self.scheduler.dropped_by_overflow + self.scheduler.dropped_by_lag
        assert self.scheduler.finished or len(self.delivered) + dropped == sum(self.written)


def worlds() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "num_envs": st.integers(1, 5),
            "batch_rows": st.sampled_from([1, 1, 2, 3, 6]),
            "fragment_length": st.integers(1, 4),
            "order": st.sampled_from(["fair", "first"]),
            "max_batches_ahead": st.integers(1, 3),
            "overflow": st.sampled_from(["wait", "drop_oldest"]),
            "total_frames": st.sampled_from([None, None, 1, 7, 50, 200]),
            "max_policy_lag": st.none() | st.integers(0, 2),
            "in_lockstep": st.sampled_from([False, False, True]),
            "episodes": st.sampled_from([False, False, True]),
        }
    ).map(lambda options: {**options, "in_lockstep": options["in_lockstep"] and options["order"] == "fair"})


class AnyWorld(RuleBasedStateMachine):
    @initialize(options=worlds())
    def begin(self, options: dict[str, Any]) -> None:
        self.options = options
        self.world = World(**options)

    @rule(envs=st.lists(st.integers(0, 4), max_size=12), asks_early=st.booleans())
    def ask(self, envs: list[int], asks_early: bool) -> None:
        for env in envs:
            if env in self.world.there - self.world.asked and len(self.world.granted[env]) < 1 + asks_early:
                self.world.ask(env)
        self.world.grant()

    @rule(envs=st.lists(st.integers(0, 4), max_size=12), random=st.booleans(), age=st.integers(0, 3))
    def finish(self, envs: list[int], random: bool, age: int) -> None:
        for env in envs:
            if env < self.world.num_envs and self.world.granted[env]:
                self.world.finish(env, self.world.length, None if random else self.world.version - age)

    @rule(envs=st.lists(st.integers(0, 4), max_size=30), asks_early=st.booleans(), age=st.integers(0, 3))
    def work(self, envs: list[int], asks_early: bool, age: int) -> None:
        for env in envs:
            if env in self.world.there:
                self.world.work(env, self.world.version - age, asks_early)

    @rule(env=st.integers(0, 4), length=st.integers(0, 3), leaves_first=st.booleans(), comes_back=st.booleans())
    def die(self, env: int, length: int, leaves_first: bool, comes_back: bool) -> None:
        if env in self.world.there:
            self.world.leave(env, min(length, self.world.length), leaves_first)
            if comes_back:
                self.world.join(env)
            self.world.grant()

    @precondition(lambda self: len(self.world.there) < self.world.num_envs)
    @rule()
    def come_back(self) -> None:
        self.world.join(min(set(range(self.world.num_envs)) - self.world.there))

    @rule(keeps=st.booleans())
    def read(self, keeps: bool) -> None:
        if not keeps:
            self.world.release()
        if not self.world.lent:
            self.world.take()
        self.world.grant()

    @rule()
    def publish_weights(self) -> None:
        self.world.version += 1

    def teardown(self) -> None:
        if hasattr(self, "world"):
            for _ in range(3):
                self.world.go_on()
            if self.options["overflow"] == "drop_oldest" and not self.options["in_lockstep"]:
                self.world.go_on_unread()
            self.world.release()
            self.world.drain()


TestAnyWorld = AnyWorld.TestCase
TestAnyWorld.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def written(some: FragmentScheduler, *envs: int, length: int = 4, version: int | None = 0) -> list[int]:
    """Let these environments write a fragment each, and say who could not begin."""
    refused = []
    for env in envs:
        some.ask(env)
    granted = dict(some.grants())
    for env in envs:
        if env in granted:
            some.finish(env, granted[env], length, version)
        else:
            refused.append(env)
    return refused


def taken(some: FragmentScheduler, version: int = 0) -> list[int] | None:
    """The environments of the next batch, whose rows are given back at once."""
    some.request()
    batch = some.take(version)
    if batch is None:
        return None
    some.release([row for row, _, _ in batch])
    return [env for _, env, _ in batch]


@given(st.lists(st.integers(0, 4), max_size=200))
def test_fair_batches_are_the_same_whoever_is_fast_and_views_of_the_ring(paces: list[int]) -> None:
    some = scheduler(num_envs=5, batch_rows=3)
    rows: list[list[int]] = [[] for _ in range(5)]
    seen = []
    for env in [*paces, *[0, 1, 2, 3, 4] * 4]:
        some.ask(env)
        for other, row in some.grants():
            rows[other].append(row)
        if rows[env]:
            some.finish(env, rows[env].pop(0), 4, 0)
        if (batch := some.take(0)) is not None:
            seen += [env for _, env, _ in batch]
            first = batch[0][0]
            assert [row for row, _, _ in batch] == [first, first + 1, first + 2]
            some.release([row for row, _, _ in batch])
    assert len(seen) >= 15
    assert seen == [index % 5 for index in range(len(seen))]


def test_a_slow_environment_holds_the_others_back_in_fair_order() -> None:
    some = scheduler(num_envs=3, batch_rows=3, max_batches_ahead=2)
    for _ in range(3):
        assert written(some, 0, 1) == []
    assert written(some, 0, 1) == [0, 1]
    some.ask(2)
    ((env, row),) = some.grants()
    assert env == 2
    assert some.grants() == []
    some.finish(2, row, 4, 0)
    assert taken(some) == [0, 1, 2]
    assert [env for env, _ in some.grants()] == [0, 1]


def test_nobody_waits_for_an_environment_that_has_left() -> None:
    some = scheduler(num_envs=3, batch_rows=2)
    some.leave(2)
    for _ in range(5):
        assert written(some, 0, 1) == []
        assert taken(some) == [0, 1]
    some.join(2)
    assert written(some, 0, 1, 2) == []
    assert taken(some) == [0, 1]


def test_first_come_batches_are_as_completed_and_wait_for_nobody() -> None:
    some = scheduler(num_envs=3, batch_rows=2, order="first")
    for env in (2, 0, 2, 2, 0, 2):
        assert written(some, env) == []
        taken_now = taken(some)
        assert taken_now in (None, [2, 0], [2, 2], [0, 2])
    assert some.frames == 24


def test_environments_wait_while_so_many_batches_are_unread() -> None:
    some = scheduler(num_envs=2, batch_rows=2, max_batches_ahead=2)
    assert written(some, 0, 1) == written(some, 0, 1) == []
    assert written(some, 0, 1) == [0, 1]
    assert taken(some) == [0, 1]
    assert [env for env, _ in some.grants()] == [0, 1]
    assert some.dropped_batches == 0


def test_the_oldest_batch_is_dropped_and_counted_where_that_is_chosen() -> None:
    some = scheduler(num_envs=2, batch_rows=2, max_batches_ahead=2, overflow="drop_oldest", max_policy_lag=0)
    for version in range(5):
        assert written(some, 0, 1, version=version) == []
    assert (some.dropped_batches, some.dropped_by_overflow) == (3, 6)
    assert taken(some, version=3) == [0, 1]
    assert taken(some, version=4) == [0, 1]
    assert taken(some, version=4) is None
    assert some.dropped_by_lag == 0


def test_fragments_of_older_weights_than_allowed_are_dropped_but_random_ones_are_not() -> None:
    some = scheduler(num_envs=2, batch_rows=2, max_policy_lag=1)
    some.ask(0)
    some.ask(1)
    (_, first), (_, second) = some.grants()
    some.finish(0, first, 4, 3)
    some.finish(1, second, 4, None)
    assert taken(some, version=5) is None
    assert some.dropped_by_lag == 1
    assert written(some, 0, version=4) == []
    assert taken(some, version=5) == [1, 0]


@pytest.mark.parametrize("overflow", ["wait", "drop_oldest"])
def test_the_last_batch_ends_with_the_frame_that_was_asked_for(overflow: Overflow) -> None:
    some = scheduler(num_envs=3, batch_rows=3, total_frames=17, overflow=overflow)
    assert written(some, 0, 1, 2) == []
    assert taken(some) == [0, 1, 2]
    assert written(some, 0, 1) == []
    batch = some.take(0)
    assert batch is not None
    assert [(env, length) for _, env, length in batch] == [(0, 4), (1, 1)]
    assert some.finished
    assert some.frames == 17
    assert written(some, 2) == [2]
    assert some.take(0) is None


@pytest.mark.parametrize("overflow", ["wait", "drop_oldest"])
def test_in_lockstep_environments_step_for_a_batch_that_is_asked_for(overflow: Overflow) -> None:
    some = scheduler(num_envs=3, batch_rows=1, in_lockstep=True, max_batches_ahead=1, overflow=overflow)
    for _ in range(3):
        assert written(some, 0) == [0]
        some.request()
        assert written(some, 0) == []
        assert some.take(0) is None  # the others are not complete
        assert written(some, 1) == written(some, 2) == []
        assert [taken(some) for _ in range(3)] == [[0], [1], [2]]
        assert some.grants() == []


def test_an_empty_fragment_is_in_no_batch_and_its_row_serves_again() -> None:
    some = scheduler(num_envs=2, batch_rows=2)
    for _ in range(3 * some.num_rows):
        assert written(some, 0) == []
        assert written(some, 1, length=0) == []
        assert taken(some) in (None, [0, 0])
    assert some.frames == 4 * 3 * some.num_rows


def test_whole_episodes_are_made_of_whatever_is_complete() -> None:
    some = scheduler(num_envs=3, batch_rows=2, episodes=True, total_frames=3, max_policy_lag=0)
    assert written(some, 0) == []
    assert taken(some, version=9) == [0]
    assert written(some, 1, 2) == []
    assert taken(some, version=9) == [1, 2]
    assert not some.finished


def test_the_counters_are_kept_for_a_collector_that_goes_on() -> None:
    some = scheduler(num_envs=2, batch_rows=2, total_frames=12)
    written(some, 0, 1)
    taken(some)
    later = scheduler(num_envs=2, batch_rows=2, total_frames=12)
    later.load_state_dict(some.state_dict())
    written(later, 0, 1)
    assert taken(later) == [0]
    assert later.finished
    with pytest.raises(ValueError, match="state of a scheduler"):
        later.load_state_dict({"frames": 1})


def test_misuse_is_refused() -> None:
    some = scheduler(num_envs=2, batch_rows=2)
    some.ask(0)
    ((_, row),) = some.grants()
    with pytest.raises(ValueError, match="environment 1 has not been granted"):
        some.finish(1, row, 4, 0)
    with pytest.raises(ValueError, match="0 to 4 steps, got 5"):
        some.finish(0, row, 5, 0)
    some.finish(0, row, 4, 0)
    with pytest.raises(ValueError, match="or has finished it"):
        some.finish(0, row, 4, 0)
    with pytest.raises(ValueError, match="not lent"):
        some.release([row])
    with pytest.raises(ValueError, match="in_lockstep needs order"):
        scheduler(order="first", in_lockstep=True)
