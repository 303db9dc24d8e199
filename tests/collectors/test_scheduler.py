"""Which environment writes which row of the ring, and which fragments are a batch, with any paces and any trouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aioinfer.collectors.scheduler import FragmentScheduler


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
        """Let all environments step and the reader read, until a batch more has come. Nothing may stop that."""
        for env in set(range(self.num_envs)) - self.there:
            self.join(env)
        for _ in range(10 + 4 * self.scheduler.num_rows):
            for env in range(self.num_envs):
                if env not in self.asked and len(self.granted[env]) < 2:
                    self.ask(env)
            self.grant()
            for env in range(self.num_envs):
                if self.granted[env]:
                    self.finish(env, self.length, self.version)
            self.release()
            if self.take() or self.scheduler.finished:
                return
        raise AssertionError("no batch has come")

    def drain(self) -> None:
        """Let all environments go, read what is there, and account for all that was written."""
        for env in list(self.there):
            self.leave(env, self.length, leaves_first=False)
        while self.take():
            self.release()
        if not self.scheduler.finished:
            unread = sum(self.written) - len(self.delivered)
            unread -= self.scheduler.dropped_by_overflow + self.scheduler.dropped_by_lag
            assert 0 <= unread < (1 if self.episodes else self.batch_rows)


def worlds() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "num_envs": st.integers(1, 5),
            "batch_rows": st.integers(1, 6),
            "fragment_length": st.integers(1, 4),
            "order": st.sampled_from(["fair", "first"]),
            "max_batches_ahead": st.integers(1, 3),
            "overflow": st.sampled_from(["wait", "drop_oldest"]),
            "total_frames": st.none() | st.integers(1, 60),
            "max_policy_lag": st.none() | st.integers(0, 2),
            "in_lockstep": st.booleans(),
            "episodes": st.booleans(),
        }
    ).map(lambda options: {**options, "in_lockstep": options["in_lockstep"] and options["order"] == "fair"})


class AnyWorld(RuleBasedStateMachine):
    @initialize(options=worlds())
    def begin(self, options: dict[str, Any]) -> None:
        self.world = World(**options)

    @rule(envs=st.sets(st.integers(0, 4)))
    def ask(self, envs: set[int]) -> None:
        for env in sorted(envs & self.world.there - self.world.asked):
            if len(self.world.granted[env]) < 2:
                self.world.ask(env)
        self.world.grant()

    @rule(envs=st.sets(st.integers(0, 4)), random=st.booleans(), age=st.integers(0, 3))
    def finish(self, envs: set[int], random: bool, age: int) -> None:
        for env in sorted(envs):
            if env < self.world.num_envs and self.world.granted[env]:
                self.world.finish(env, self.world.length, None if random else self.world.version - age)

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
            self.world.release()
            self.world.drain()


TestAnyWorld = AnyWorld.TestCase
TestAnyWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
