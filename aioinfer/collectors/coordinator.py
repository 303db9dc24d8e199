"""Decides which environment writes where, what becomes of one that fails, and which fragments are the next batch."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.fragments import FragmentLayout, FragmentRing
from aioinfer.collectors.host import EnvHost
from aioinfer.collectors.local_policy import PolicySource
from aioinfer.collectors.messages import (
    Begin,
    Cancelled,
    Failed,
    Grants,
    GroupMembers,
    GroupSetup,
    HostConfig,
    Made,
    Making,
    MemberFailed,
    MemberReady,
    Parked,
    Pause,
    Progress,
    Restart,
    Resume,
    Retire,
    Stop,
    ThreadLeft,
)
from aioinfer.collectors.policy_layout import PolicyLayout
from aioinfer.collectors.restarts import RestartBudget, Restarts
from aioinfer.collectors.scheduler import FragmentScheduler
from aioinfer.collectors.seeds import env_seed
from aioinfer.collectors.spaces import EnvLayout, InfoKeys
from aioinfer.collectors.stats import StatsRecorder
from aioinfer.collectors.watch import ControlBlock, Overdue, Phase, Watch, overdue
from aioinfer.collectors.worker_pool import WorkerPool
from aioinfer.errors import CollectorError, PeerDiedError, describe
from aioinfer.ipc.pickling import load_exception

__all__ = ["LOOK_AGAIN", "Coordinator", "Member"]

LOOK_AGAIN = 1.0
"""Seconds after which who waits looks again: a signal handler may have notified just before the wait began."""

_log = logging.getLogger("aioinfer")

# Seconds that an environment has to return from a call when the collector ends, and how often that is looked at.
_CALL_GRACE = 1.0
_CALL_INTERVAL = 0.005

_NEVER = int(np.iinfo(np.int64).max)
"""Newer than any version."""


@dataclass
class Member:
    """What one factory makes: an environment, or several that step as one.

    Attributes:
        number: in the order of the factories.
        factory: makes it.
        host: the index of the host that has it.
        incarnation: how often it was made again.
        envs: the numbers of its environments.
        making_since: when its factory was called, if it has not returned yet.
        retired: whether it is gone for good.
        present: whether its environments step.
        cause: what it failed with last.
    """

    number: int
    factory: Callable[[], Any]
    host: int
    incarnation: int = 0
    envs: tuple[int, ...] = ()
    making_since: float | None = None
    retired: bool = False
    present: bool = False
    cause: BaseException | None = None


@dataclass
class _Host:
    """A process with environments.

    Attributes:
        members: their numbers.
        groups: what it has made.
        begun: whether it was told to begin.
        indices: of its groups in the control block.
        killed_for: the member that has hung, and what its environments are told, if it was killed for that.
    """

    members: list[int]
    groups: tuple[GroupMembers, ...] = ()
    made: bool = False
    begun: bool = False
    indices: list[int] = field(default_factory=list)
    killed_for: dict[int, BaseException] = field(default_factory=dict)
    parked: bool = False
    gone: bool = False


class Coordinator:
    """The state of a collector that runs. All of it belongs to the holder of ``lock``, from any thread.

    Hosts report here; readers wait here for batches.

    Args:
        factories: one for each member.
        num_workers: processes; 0: the environments are in this one.
        groups: of each host.
        info_keys: see :class:`HostConfig`.
        entropy: all seeds come from it.
        incarnations: how often each member was made before, by an earlier collector whose state this one continues.
        step_timeout: seconds that a step may take.
        reset_timeout: seconds that a reset may take, or the making of an environment.
        restarts: how often a member that fails is made again; ``None``: never.
        min_envs: how many environments must be left.
        stats: counts.
        loop: where asynchronous environments of this process run.

    Attributes:
        lock: guards everything, and is notified when a batch may be there.
        layout: of the environments, once they are made.
        num_envs: how many there are, once they are made.
        error: why the collector has ended, if it failed.
        close_timeout: seconds that closing may take.
    """

    def __init__(
        self,
        factories: Sequence[Callable[[], Any]],
        *,
        num_workers: int,
        groups: int,
        info_keys: InfoKeys,
        entropy: int,
        incarnations: Sequence[int],
        step_timeout: float | None,
        reset_timeout: float | None,
        restarts: Restarts | None,
        min_envs: int,
        stats: StatsRecorder,
        loop: Any = None,
    ) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.layout: EnvLayout | None = None
        self.num_envs = 0
        self.error: BaseException | None = None
        self.close_timeout = 5.0
        self.members = [
            Member(number, factory, 0, incarnation=incarnation)
            for number, (factory, incarnation) in enumerate(zip(factories, incarnations, strict=True))
        ]
        self._in_process = num_workers == 0
        self._groups = groups
        self._info_keys = info_keys
        self._entropy = entropy
        self._step_timeout, self._reset_timeout = step_timeout, reset_timeout
        self._budget = RestartBudget(restarts)
        self._min_envs = min_envs
        self._stats = stats
        self._loop = loop
        self._hosts = [
            _Host([int(number) for number in share])
            for share in np.array_split(np.arange(len(self.members)), max(1, num_workers))
            if len(share)
        ]
        for index, host in enumerate(self._hosts):
            for number in host.members:
                self.members[number].host = index
        self._local: EnvHost | None = None
        self._member_of_env: list[int] = []
        self._row_env: dict[int, int] = {}  # the rows that were granted and are not finished
        self._frames: list[int] = []  # of each environment
        self._waiters: deque[Callable[[], None]] = deque()
        # By group: when its latest call began that took too long, and when it was cancelled for that.
        self._late: dict[int, tuple[float, float]] = {}
        self._setup: _Setup | None = None
        self._stopping = False
        self._paused = 0  # how many want the environments to stop
        self._pause = 0  # the number of the latest pause
        self._pool = WorkerPool(
            on_message=self._receive, on_exit=self._note_exit, on_tick=self._tick, host=EnvHost, stop=Stop()
        )

    # -- start -----------------------------------------------------------------------------------------

    def make(self) -> tuple[EnvLayout, bool]:
        """Make all environments; returns their layout, and whether some make unequal numbers of steps. Blocks.

        Raises:
            CollectorError: too few could be made.
        """
        self._pool.start()
        if self._in_process:
            self._local = EnvHost(
                self._config(self._hosts[0]), partial(self._receive, 0), loop=self._loop, can_abandon=True
            )
            threading.Thread(target=self._local.make, name="aioinfer-make", daemon=True).start()
        else:
            for index, host in enumerate(self._hosts):
                self._pool.launch(index, self._config(host))
        with self.lock:
            while not self.lock.wait_for(self._has_made, LOOK_AGAIN):
                pass
            self.check()
            if self._stopping:
                raise RuntimeError("the collector was shut down while it was started")
            assert self.layout is not None
            self._number_envs()
            uneven = any(group.is_uneven for host in self._hosts for group in host.groups)
            return self.layout, uneven

    def _has_made(self) -> bool:
        if self.error is not None or self._stopping:
            return True
        return all(host.made or self._is_gone(host) for host in self._hosts)

    def _config(self, host: _Host) -> HostConfig:
        factories = {
            number: self.members[number].factory for number in host.members if not self.members[number].retired
        }
        return HostConfig(factories, self._groups, self._info_keys)

    def _is_gone(self, host: _Host) -> bool:
        return all(self.members[number].retired for number in host.members)

    def _number_envs(self) -> None:
        """Number the environments in the order of the factories, whatever host has them."""
        sizes = {
            member: size
            for host in self._hosts
            for group in host.groups
            for member, size in zip(group.members, group.sizes, strict=True)
        }
        for member in self.members:
            size = sizes.get(member.number, 1)
            member.envs = tuple(range(self.num_envs, self.num_envs + size))
            self._member_of_env += [member.number] * size
            self.num_envs += size
        self._frames = [0] * self.num_envs

    def begin(
        self,
        scheduler: FragmentScheduler,
        policy: PolicyLayout,
        layout: FragmentLayout,
        *,
        random_frames: Sequence[int],
        episodes: Sequence[int],
        server: Any,
        address: str | None,
        local: PolicySource | None,
    ) -> None:
        """Have all hosts step their environments from now on.

        Args:
            scheduler: of the fragments.
            policy: what requests to the policy and replies have.
            layout: of the ring.
            random_frames: how many steps each environment makes at random.
            episodes: how many each environment has begun before, if it has.
            server: makes clients of the policy in this process.
            address: where workers find the policy.
            local: of the policy, where groups run it themselves.
        """
        with self.lock:
            num_groups = sum(len(host.groups) for host in self._hosts)
            shared = not self._in_process
            self.scheduler = scheduler
            self.ring = FragmentRing(layout, scheduler.num_rows, shared=shared)
            self.block = ControlBlock(num_groups, self.num_envs, shared=shared)
            if len(episodes) == self.num_envs:
                self.block.episodes[:] = episodes
            self._setup = _Setup(policy, layout, tuple(random_frames), server, address, local)
            start = 0
            for host in self._hosts:
                host.indices = list(range(start, start + len(host.groups)))
                start += len(host.groups)
            for member in self.members:
                if member.retired:
                    for env in member.envs:
                        scheduler.leave(env)
            for index, host in enumerate(self._hosts):
                if host.made:
                    self._begin(index)
        self._pool.call_soon(_look_again)

    def _begin(self, index: int) -> None:
        host, setup = self._hosts[index], self._setup
        assert setup is not None
        groups = []
        for position, group in zip(host.indices, host.groups, strict=False):
            envs = tuple(env for number in group.members for env in self.members[number].envs)
            seeds = tuple(seed for number in group.members for seed in self._seeds(self.members[number]))
            groups.append(GroupSetup(position, envs, seeds))
        random_left = [
            max(0, random - frames) for random, frames in zip(setup.random_frames, self._frames, strict=True)
        ]
        message = Begin(
            tuple(groups),
            setup.policy,
            setup.layout,
            self.ring.num_rows,
            len(self.block.watches),
            self.num_envs,
            random_left,
            setup.address,
            None if setup.local is None else setup.local.pickled,
        )
        host.begun = True
        for group in host.groups:
            for number in group.members:
                self.members[number].present = True
        if self._local is not None:
            self._local.begin(message, self.ring, self.block, setup.server, setup.local)
        else:
            memories = [
                self.ring.memory,
                self.block.memory,
                None if setup.local is None else setup.local.weights.memory,
            ]
            self._pool.send(index, message, [memory.fd for memory in memories if memory is not None])
        if self._paused:
            self._send(index, Pause(self._pause))

    def _seeds(self, member: Member) -> tuple[int, ...]:
        return tuple(env_seed(self._entropy, env, member.incarnation) for env in member.envs)

    def _send(self, index: int, message: Any) -> None:
        if self._local is not None:
            self._local.handle(message)
        else:
            self._pool.send(index, message)

    # -- what hosts report -----------------------------------------------------------------------------

    def _receive(self, index: int, message: Any) -> None:
        with self.lock:
            if self._stopping and not isinstance(message, Progress):
                return
            match message:
                case Progress():
                    self._note_progress(message)
                case Making(number, under_way):
                    self.members[number].making_since = time.monotonic() if under_way else None
                    self._pool.call_soon(_look_again)
                case Made():
                    self._note_made(index, message)
                case MemberReady(number):
                    member = self.members[number]
                    member.making_since, member.present = None, True
                    for env in member.envs:
                        self.scheduler.join(env)
                case MemberFailed(number, error):
                    self._fail_member(self.members[number], load_exception(error))
                case ThreadLeft():
                    self._stats.abandon()
                case Parked(number):
                    self._hosts[index].parked = number == self._pause
                case Failed(error):
                    self.fail(load_exception(error))
            self._grant()
            if not isinstance(message, Progress) or self.scheduler.has_batch:  # else there is nothing new to read
                self._notify()

    def _note_progress(self, message: Progress) -> None:
        for env, row in message.finished:
            self._finish(env, row)
        for env in message.asking:
            if self.members[self._member_of_env[env]].present:
                self.scheduler.ask(env)
        self._stats.add(message)

    def _finish(self, env: int, row: int) -> None:
        self._row_env.pop(row, None)
        length = int(self.ring.lengths[row])
        self._frames[env] += length
        oldest = self.oldest_versions([row], [length]) if self.scheduler.drops_by_lag else []
        self.scheduler.finish(env, row, length, oldest[0] if oldest else None)

    def oldest_versions(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The oldest version of the weights in each of these fragments, but for those all of whose actions are random.

        Args:
            rows: of the fragments, which are finished.
            lengths: how many of their steps count.
        """
        versions = self.ring.columns[("policy_version",)][rows]
        asked = np.arange(self.ring.layout.length) < np.array(lengths)[:, None]
        asked &= ~self.ring.columns["collector", "random"][rows]
        oldest: NDArray[np.int64] = versions.min(1, where=asked, initial=_NEVER)
        return [version for version in oldest.tolist() if version < _NEVER]

    def _note_made(self, index: int, message: Made) -> None:
        host = self._hosts[index]
        for number in host.members:
            self.members[number].making_since = None
        layout = message.layout
        if self.layout is None:
            self.layout = layout
        elif layout is not None and layout != self.layout:
            error = ValueError(f"the spaces of these environments are not those of the others: {layout}")
            for number in host.members:
                self._retire(self.members[number], error)
            return
        host.groups, host.made, host.killed_for = message.groups, True, {}
        if self._setup is None:
            return
        for group in host.groups:  # it was made again
            for number, size in zip(group.members, group.sizes, strict=True):
                if size != len(self.members[number].envs):
                    self.fail(ValueError(f"environment {number} has {size} rows now, it had others before"))
                    return
        self._begin(index)
        for group in host.groups:
            for number in group.members:
                for env in self.members[number].envs:
                    self.scheduler.join(env)

    # -- members that fail -----------------------------------------------------------------------------

    def _fail_member(self, member: Member, error: BaseException) -> None:
        """A member is gone, in a host that runs: have it made again, or go on without it."""
        self._leave(member, error)
        if self._budget.spend(member.number, time.monotonic()):
            member.incarnation += 1
            self._stats.restart(member.envs or (member.number,))
            _log.warning("%s: it is made again", _what_failed(member, error))
            self._send(member.host, Restart(member.number, self._seeds(member)))
        else:
            self._send(member.host, Retire(member.number))
            self._retire(member, error)

    def _leave(self, member: Member, error: BaseException) -> None:
        member.cause, member.present, member.making_since = error, False, None
        if self._setup is not None:
            for env in member.envs:
                self.scheduler.leave(env)

    def _retire(self, member: Member, error: BaseException) -> None:
        member.retired, member.cause = True, error
        _log.error("%s: it is not made again", _what_failed(member, error))
        left = sum(len(one.envs) or 1 for one in self.members if not one.retired)
        if left < self._min_envs:
            causes = self.retired
            by_text: dict[str, list[str]] = {}
            for env, cause in causes.items():
                by_text.setdefault(describe(cause), []).append(str(env))
            listed = "; ".join(f"environment {', '.join(envs)}: {text}" for text, envs in by_text.items())
            error = CollectorError(
                f"{left} environments are left, min_envs is {self._min_envs}. {listed}", causes=causes
            )
            error.__cause__ = next(iter(causes.values()), None)
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End with an error, which every reader gets from now on."""
        with self.lock:
            if self.error is None:
                self.error = error
            self._notify()

    def _note_exit(self, index: int, how: str) -> None:
        """A worker is gone: what of its fragments is complete counts, and it is started again."""
        with self.lock:
            if self._stopping:
                return
            host = self._hosts[index]
            under_way = self._under_way(host, f"worker {index} {how}")
            blamed = host.killed_for or under_way
            died = PeerDiedError(f"worker {index} {how}")
            here = [self.members[number] for number in host.members if not self.members[number].retired]
            for env, row in [(env, row) for row, env in self._row_env.items() if self._host_of(env) == index]:
                self._salvage(env, row)
            for member in here:
                self._leave(member, blamed.get(member.number, died))
            now = time.monotonic()
            for member in here:
                member.incarnation += 1
                if (member.number in blamed or not blamed) and not self._budget.spend(member.number, now):
                    self._retire(member, blamed.get(member.number, died))
                else:
                    self._stats.restart(member.envs or (member.number,))
            host.made = host.begun = host.parked = False
            host.killed_for = {}
            if self.error is None and not self._is_gone(host):
                _log.warning("worker %d %s: it is started again", index, how)
                try:
                    self._pool.launch(index, self._config(host))
                except Exception as launching:  # no descriptor is left, for example
                    for member in here:
                        if not member.retired:
                            self._retire(member, launching)
            self._grant()
            self._notify()

    def _host_of(self, env: int) -> int:
        return self.members[self._member_of_env[env]].host

    def _under_way(self, host: _Host, how: str) -> dict[int, BaseException]:
        """The members whose calls were under way when a worker ended: one of them may be to blame."""
        found: dict[int, BaseException] = {}
        for number in host.members:
            if self.members[number].making_since is not None:
                found[number] = PeerDiedError(f"{how} while environment {number} was made")
        if not host.begun:
            return found
        for index, group in zip(host.indices, host.groups, strict=False):
            watch = self.block.watches[index]
            if watch.phase[0] != Phase.IDLE:
                number = group.members[int(watch.member[0])]
                doing = Phase(int(watch.phase[0])).name.lower()
                found[number] = PeerDiedError(f"{how} while environment {number} was in {doing}")
                watch.end()
        return found

    def _salvage(self, env: int, row: int) -> None:
        """Finish the fragment that a dead worker has left: its last complete step is truncated."""
        self.ring.truncate(row)
        self._finish(env, row)

    # -- time ------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> float | None:
        """Look for calls that take too long; returns the seconds until it is worth to look again."""
        with self.lock:
            if self._stopping or self.error is not None:
                return None
            soonest: list[float] = []
            if self._reset_timeout is not None:
                for member in self.members:
                    if member.making_since is not None and not member.retired:
                        left = member.making_since + self._reset_timeout - now
                        if left > 0:
                            soonest.append(left)
                        else:
                            self._note_timeout(member, "was not made", self._reset_timeout)
                            self._cancel(member, None)
            if self._setup is not None:
                found, left_all = overdue(
                    self.block.watches, now, step_timeout=self._step_timeout, reset_timeout=self._reset_timeout
                )
                for late in found:
                    self._cancel_late(late, now)
                if left_all is not None:
                    soonest.append(left_all)
            return min(soonest, default=None)

    def _cancel_late(self, late: Overdue, now: float) -> None:
        for host in self._hosts:
            if late.group in host.indices and host.begun and not host.killed_for:
                group = host.groups[host.indices.index(late.group)]
                doing = {Phase.STEP: "step", Phase.RESET: "reset", Phase.CLOSE: "close"}[late.phase]
                limit = self._step_timeout if late.phase == Phase.STEP else self._reset_timeout
                member, since = self.members[group.members[late.member]], float(self.block.watches[late.group].since[0])
                known, cancelled_at = self._late.get(late.group, (0.0, 0.0))
                if known != since:
                    self._note_timeout(member, f"did not return from {doing}", limit)
                elif limit is None or now - cancelled_at < limit:  # it may be about to end
                    continue
                self._late[late.group] = since, now  # a task that was cancelled may go on nevertheless
                self._cancel(member, limit)

    def _note_timeout(self, member: Member, what: str, limit: float | None) -> None:
        message = f"environment {member.number} {what} within {limit} s"
        _log.warning(message)
        member.making_since = None
        self._stats.timeout()
        if self._local is None:
            self._hosts[member.host].killed_for[member.number] = TimeoutError(message)

    def _cancel(self, member: Member, seconds: float | None) -> None:
        if self._local is not None:
            self._local.handle(Cancelled(member.number, seconds))
        else:
            self._pool.kill(member.host)

    # -- readers ---------------------------------------------------------------------------------------

    def _grant(self) -> None:
        if self._setup is None or self.error is not None or self._stopping:
            return
        by_host: dict[int, list[tuple[int, int]]] = {}
        for env, row in self.scheduler.grants():
            self.ring.assign(row, env)
            self._row_env[row] = env
            by_host.setdefault(self._host_of(env), []).append((env, row))
        for index, pairs in by_host.items():
            self._send(index, Grants(pairs))

    def grant(self) -> None:
        """Hand out the rows that have become free. Under the lock."""
        self._grant()

    def check(self) -> None:
        """Raise the error that the collector has ended with. Under the lock."""
        if self.error is not None:
            raise self.error

    @property
    def has_begun(self) -> bool:
        """Whether the environments were told to step."""
        return self._setup is not None

    @property
    def group_sizes(self) -> list[int]:
        """How many environments each group has."""
        return [sum(group.sizes) for host in self._hosts for group in host.groups]

    @property
    def retired(self) -> dict[int, BaseException]:
        """Environments that are gone for good, and why."""
        gone = [(env, one.cause) for one in self.members if one.retired for env in one.envs or (one.number,)]
        return {env: cause for env, cause in gone if cause is not None}

    def episodes(self) -> list[int]:
        """How many episodes each environment has begun."""
        with self.lock:
            return [] if self._setup is None else self.block.episodes.tolist()

    def watches(self) -> list[list[Watch]]:
        """Of the groups of each host. Under the lock."""
        return [[self.block.watches[index] for index in host.indices] for host in self._hosts]

    def notify(self) -> None:
        """Have every reader look again. Under the lock."""
        self._notify()

    def _notify(self) -> None:
        self.lock.notify_all()
        while self._waiters:
            self._waiters.popleft()()

    def call_at_change(self, waiter: Callable[[], None]) -> None:
        """Call ``waiter`` once when a batch may be there. Under the lock."""
        self._waiters.append(waiter)

    # -- pause and end ---------------------------------------------------------------------------------

    def pause(self, timeout: float | None) -> None:
        """Stop all environments between two steps, and wait until they have.

        Raises:
            TimeoutError: they have not within ``timeout`` seconds. They stop as soon as they can.
        """
        with self.lock:
            self._paused += 1
            self._pause += 1
            for index, host in enumerate(self._hosts):
                host.parked = False
                if host.begun:
                    self._send(index, Pause(self._pause))
            done = self.lock.wait_for(self._has_parked, timeout)
            self.check()
            if not done:
                raise TimeoutError(f"the environments have not stopped within {timeout} s")

    def _has_parked(self) -> bool:
        if self.error is not None or self._stopping:
            return True
        return all(host.parked or not host.begun for host in self._hosts)

    def resume(self) -> None:
        """Let the environments go on, unless another pause lasts on."""
        with self.lock:
            self._paused -= 1
            if self._paused:
                return
            for index, host in enumerate(self._hosts):
                if host.begun:
                    self._send(index, Resume())

    def close(self) -> None:
        """End all environments, hosts and processes; what does not end in time is killed, or left behind.

        An environment is not waited for that has not returned from a step, a reset or its making after a second and
        twice the time of the longest step that is known.
        """
        timeout = self.close_timeout
        deadline = time.monotonic() + timeout
        with self.lock:
            self._stopping = True
            for index in range(len(self._hosts)):
                self._send(index, Stop())
            self._notify()
        stuck: list[int] = []
        try:
            stuck = self._wait_for_calls(min(timeout, _CALL_GRACE + 2 * self._stats.longest_step()))
            if self._local is not None:
                host = self._hosts[0]
                hung = {number for number, index in enumerate(host.indices) if stuck and self._is_in_call(index)}
                left = deadline - time.monotonic()
                self._local.join(max(0.0, min(left, _CALL_GRACE) if stuck else left), hung=hung)
        finally:
            for index in stuck:
                self._pool.kill(index)
            self._pool.close(max(0.0, deadline - time.monotonic()))

    def _wait_for_calls(self, seconds: float) -> list[int]:
        """Wait until no environment is stepped, reset or made; returns the hosts where one is all the same."""
        deadline = time.monotonic() + seconds
        while stuck := [index for index, host in enumerate(self._hosts) if self._is_calling(host)]:
            if time.monotonic() >= deadline:
                break
            time.sleep(_CALL_INTERVAL)
        return stuck

    def _is_calling(self, host: _Host) -> bool:
        if any(self.members[number].making_since is not None for number in host.members):
            return True
        return host.begun and any(map(self._is_in_call, host.indices))

    def _is_in_call(self, index: int) -> bool:
        """Whether a group waits for an environment to return from its step or reset."""
        return int(self.block.watches[index].phase[0]) in (Phase.STEP, Phase.RESET)


@dataclass(frozen=True)
class _Setup:
    """What hosts need to begin."""

    policy: PolicyLayout
    layout: FragmentLayout
    random_frames: tuple[int, ...]
    server: Any
    address: str | None
    local: PolicySource | None


def _look_again() -> None:
    """A job of the pool that does nothing: its next tick may be due earlier than it was."""


def _what_failed(member: Member, error: BaseException) -> str:
    return f"environment {member.number} failed with {describe(error)}"
