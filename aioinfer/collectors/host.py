"""A host: all environments of one process, in groups, each of which has a thread; an asynchronous one has a task."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence, Set
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from aioinfer.client import AsyncInferenceClient, ClientMaker, InferenceClient
from aioinfer.collectors.environments import Stepper, is_async, is_several, make_stepper
from aioinfer.collectors.fragments import FragmentRing
from aioinfer.collectors.group import EnvGroup, Episodes, as_failure, as_message
from aioinfer.collectors.local_policy import LocalPolicy, PolicySource
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
    Parked,
    Pause,
    Restart,
    Resume,
    Retire,
    Stop,
    ThreadLeft,
)
from aioinfer.collectors.policy_caller import Policy, PolicyCaller, ServedPolicy
from aioinfer.collectors.row_writer import RowWriter
from aioinfer.collectors.spaces import EnvLayout
from aioinfer.collectors.task_policy import ServedTaskPolicy, TaskPolicy, TickPolicy, is_short
from aioinfer.collectors.tasks import EnvTask, Episode, TaskRows, TaskStepper
from aioinfer.collectors.watch import ControlBlock, Watch
from aioinfer.collectors.writer import FragmentWriter
from aioinfer.errors import describe
from aioinfer.futures import run_in_thread
from aioinfer.transports import connect

__all__ = ["EnvHost"]

_log = logging.getLogger("aioinfer")


class _Group(Protocol):
    """A group of either kind. Any thread calls these, and none of them blocks, but for ``join``."""

    members: list[int]
    envs: list[int]

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def join(self, timeout: float | None) -> bool: ...
    def grant(self, pairs: Sequence[tuple[int, int]]) -> None: ...
    def pause(self, on_parked: Callable[[], None]) -> None: ...
    def resume(self) -> None: ...
    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None: ...
    def abandon(self, seconds: float) -> bool: ...


class _SharedPolicy(NamedTuple):
    """The policy of all asynchronous environments, their rows, and those that no task has yet."""

    policy: TickPolicy
    rows: TaskRows
    free: Iterator[int]


class EnvHost:
    """Makes the environments of this process, divides them into groups, and hands messages to these.

    Args:
        config: what it makes.
        report: called with messages for the collector, on any thread of this process.
        loop: where asynchronous environments run; by default a loop in a thread of its own.
        can_abandon: call each factory in a thread of its own, which can be left behind.
    """

    def __init__(
        self,
        config: HostConfig,
        report: Callable[[Any], None],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        can_abandon: bool = False,
    ) -> None:
        self._config = config
        self._report = report
        self._loop = loop
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._can_abandon = can_abandon
        self._divided: list[tuple[GroupMembers, list[Any]]] = []
        self._unused: list[Any] = []  # environments that no group has
        self._has_made = threading.Event()  # whether ``make`` has returned
        self._groups: list[_Group] = []
        self._clients: list[InferenceClient | AsyncInferenceClient] = []
        self._by_member: dict[int, _Group] = {}
        self._by_env: dict[int, _Group] = {}
        self._lock = threading.Condition()  # guards what follows
        self._decisions: dict[int, bool] = {}  # by member: whether to try again, while they are made
        self._stopping = False
        self._making: set[int] = set()  # members that are being made
        self._cancelled: set[int] = set()  # and those whose making has taken too long
        self._parked: set[_Group] = set()  # in the latest pause
        self._pause = 0

    # -- make ------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the environments, and report :class:`Made`. Blocks: the factories are the user's."""
        try:
            self._make()
        finally:
            self._has_made.set()

    def _make(self) -> None:
        envs: dict[int, Any] = {}
        steppers: dict[int, Stepper | TaskStepper] = {}
        layout: EnvLayout | None = None
        for member, factory in self._config.factories.items():
            while True:
                self._report(Making(member))
                try:
                    env = self._call(member, factory)
                    self._unused.append(env)
                    stepper = self._stepper([env], Watch())
                    if layout is not None and stepper.layout != layout:
                        raise ValueError(f"the spaces of environment {member} are not those of the others")
                except BaseException as error:
                    if self._stopping:
                        return
                    self._report(as_failure(member, error))
                    if self._wait_for_decision(member):
                        continue
                    break
                layout = stepper.layout
                envs[member], steppers[member] = env, stepper
                break
            self._report(Making(member, under_way=False))
            if self._stopping:
                return
        self._divide(envs, steppers)
        self._report(Made(layout, tuple([members for members, _ in self._divided])))

    def _stepper(self, envs: Sequence[Any], watch: Watch) -> Any:
        if is_async(envs[0]):
            return TaskStepper(envs[0], watch, self._config.info_keys)
        return make_stepper(envs, watch, self._config.info_keys)

    def _wait_for_decision(self, member: int) -> bool:
        with self._lock:
            self._lock.wait_for(lambda: self._stopping or member in self._decisions)
            return self._decisions.pop(member, False)

    def _divide(self, envs: dict[int, Any], steppers: dict[int, Stepper | TaskStepper]) -> None:
        """Share single environments out among the groups, by kind; what steps as one is a group of its own."""
        shares: list[list[int]] = []
        kinds: dict[type, list[int]] = {}
        for member, env in envs.items():
            if is_async(env) or is_several(env):
                shares.append([member])
            else:
                kinds.setdefault(type(steppers[member]), []).append(member)
        for single in kinds.values():
            # With fewer members, when a worker is started again, there are never more groups than before.
            count = min(self._config.groups, len(single))
            bounds = [index * len(single) // count for index in range(count + 1)]
            shares += [single[start:end] for start, end in pairwise(bounds)]
        for members in sorted(shares):
            stepper = steppers[members[0]]
            sizes = (stepper.size, *[1] * (len(members) - 1))
            described = GroupMembers(tuple(members), sizes, stepper.is_uneven)
            self._divided.append((described, [envs[member] for member in members]))

    # -- messages --------------------------------------------------------------------------------------

    def handle(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Do what a message says. Never blocks, but for :class:`Begin` in a worker, which connects to the policy."""
        match message:
            case Begin():
                self._open(message, descriptors)
            case Grants(pairs):
                by_group: dict[_Group, list[tuple[int, int]]] = {}
                for pair in pairs:
                    by_group.setdefault(self._by_env[pair[0]], []).append(pair)
                for group, of_group in by_group.items():
                    group.grant(of_group)
            case Restart(member, seeds):
                self._restart(member, seeds)
            case Retire(member):
                self._decide(member, False)
            case Cancelled(member, seconds):
                self._cancel(member, seconds)
            case Pause(number):
                with self._lock:
                    self._parked, self._pause = set(), number
                if not self._groups:
                    self._report(Parked(number))
                for group in self._groups:
                    group.pause(partial(self._note_parked, group, number))
            case Resume():
                for group in self._groups:
                    group.resume()
            case Stop():
                with self._lock:
                    self._stopping = True
                    self._lock.notify_all()
                for group in self._groups:
                    group.stop()

    def _open(self, message: Begin, descriptors: Sequence[int]) -> None:
        try:
            ring = FragmentRing(message.layout, message.num_rows, descriptor=descriptors[0])
            block = ControlBlock(message.num_groups, message.num_envs, descriptor=descriptors[1])
            local = None if message.local is None else PolicySource.of_worker(message.local, descriptors[2])
            assert message.address is not None
            self.begin(message, ring, block, connect(message.address), local)
        except BaseException as error:
            self._report(Failed(as_message(error)))

    def begin(
        self,
        message: Begin,
        ring: FragmentRing,
        block: ControlBlock,
        server: ClientMaker,
        local: PolicySource | None,
    ) -> None:
        """Start all groups, which get copies of the policy where there is a source of them."""
        groups: list[_Group] = []
        shared = self._share_policy(message, local)
        for setup, (members, envs) in zip(message.groups, self._divided, strict=True):
            group = self._make_group(
                message, setup, members, envs, ring=ring, block=block, server=server, local=local, shared=shared
            )
            groups.append(group)
            self._by_member.update(dict.fromkeys(members.members, group))
            self._by_env.update(dict.fromkeys(setup.envs, group))
        self._groups = groups
        used = {id(env) for _, envs in self._divided for env in envs}
        self._unused = [env for env in self._unused if id(env) not in used]
        for group in groups:
            group.start()

    def _make_group(
        self,
        message: Begin,
        setup: GroupSetup,
        members: GroupMembers,
        envs: Sequence[Any],
        *,
        ring: FragmentRing,
        block: ControlBlock,
        server: ClientMaker,
        local: PolicySource | None,
        shared: _SharedPolicy | None,
    ) -> _Group:
        watch: Watch = block.watches[setup.number]
        stepper = self._stepper(envs, watch)
        layout, policy = stepper.layout, message.policy
        parts: dict[str, Any] = {
            "members": members.members,
            "envs": setup.envs,
            "seeds": setup.seeds,
            "report": self._report,
        }
        random_steps = [message.random_frames[env] for env in setup.envs]
        if isinstance(stepper, TaskStepper):
            env = setup.envs[0]
            of_task = self._task_policy(stepper, message, setup.number, server, shared)
            return EnvTask(
                stepper,
                loop=self._event_loop(),
                policy=of_task,
                writer=RowWriter(ring, env, stepper.row, layout, policy),
                episode=Episode(env, block),
                random_steps=random_steps[0],
                **parts,
            )
        own = self._local_policy(message, local)
        return EnvGroup(
            stepper,
            watch=watch,
            caller=PolicyCaller(policy, stepper.observations, stepper.is_init, setup.number, owned=own is not None),
            policy=own or self._served_policy(server, stepper.size),
            writer=FragmentWriter(ring, setup.envs, layout, policy),
            episodes=Episodes(setup.envs, block),
            random_steps=random_steps,
            mode=policy.interaction_type,
            **parts,
        )

    def _share_policy(self, message: Begin, local: PolicySource | None) -> _SharedPolicy | None:
        """A copy of the policy for all asynchronous environments, where it does not block their event loop for long."""
        envs = [envs[0] for _, envs in self._divided if is_async(envs[0])]
        policy = self._local_policy(message, local) if envs else None
        if policy is None:
            return None
        rows = TaskRows(self._stepper(envs[:1], Watch()).layout, len(envs))
        caller = PolicyCaller(message.policy, rows.observations, rows.is_init)
        try:
            if is_short(policy, caller):
                policy = self._local_policy(message, local)  # another one, which has counted nothing yet
                assert policy is not None
                return _SharedPolicy(TickPolicy(policy, caller), rows, iter(range(len(envs))))
            reason = "a forward pass would block their event loop for too long"
        except Exception as error:  # of the user's policy, which may not take so many rows
            reason = describe(error)
        _log.info("a server computes the actions of asynchronous environments: %s", reason)
        return None

    def _task_policy(
        self, stepper: TaskStepper, message: Begin, group: int, server: ClientMaker, shared: _SharedPolicy | None
    ) -> TaskPolicy:
        if shared is not None:
            stepper.share(shared.rows, next(shared.free))
            return shared.policy
        client = server.async_client()
        self._clients.append(client)
        caller = PolicyCaller(message.policy, stepper.rows.observations, stepper.rows.is_init, group)
        return ServedTaskPolicy(client, caller, message.policy.interaction_type)

    def _local_policy(self, message: Begin, local: PolicySource | None) -> LocalPolicy | None:
        """A copy of the policy, where groups are to run it themselves, and this process can."""
        if local is None:
            return None
        try:
            return LocalPolicy(local, message.policy.version_key, message.policy.interaction_type)
        except Exception as error:  # of unpickling: its class may be unknown here
            _log.warning("the server computes the actions of a group, which can't run the policy: %s", describe(error))
            return None

    def _served_policy(self, server: ClientMaker, rows: int) -> Policy:
        clients = server.clients(1, copy=False)
        self._clients += clients
        most = clients[0].max_rows
        if most is not None and most < rows:
            clients += server.clients(math.ceil(rows / most) - 1, copy=False)
            self._clients += clients[1:]
        return ServedPolicy(clients)

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = self._own_loop = asyncio.new_event_loop()
            threading.Thread(target=self._run_loop, args=(self._loop,), name="aioinfer-envs", daemon=True).start()
        return self._loop

    def _run_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
            for task in asyncio.all_tasks(loop):  # those that were left behind
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
        finally:
            loop.close()

    def _note_parked(self, group: _Group, number: int) -> None:
        with self._lock:
            if number == self._pause:
                self._parked.add(group)
            all_parked = number == self._pause and len(self._parked) == len(self._groups)
        if all_parked:
            self._report(Parked(number))

    # -- members that are made again -------------------------------------------------------------------

    def _restart(self, member: int, seeds: Sequence[int]) -> None:
        if member not in self._by_member:  # it is being made for the first time
            self._decide(member, True)
            return
        run_in_thread(partial(self._make_again, member, seeds), "aioinfer-make")

    def _decide(self, member: int, again: bool) -> None:
        with self._lock:
            self._decisions[member] = again
            self._lock.notify_all()

    def _make_again(self, member: int, seeds: Sequence[int]) -> None:
        self._report(Making(member))
        try:
            env = self._call(member, self._config.factories[member])
        except BaseException as error:
            self._report(as_failure(member, error))
            return
        self._report(Making(member, under_way=False))
        self._by_member[member].replace(member, env, seeds)

    def _cancel(self, member: int, seconds: float | None) -> None:
        if seconds is not None:
            abandoned = self._by_member[member].abandon(seconds)
        else:
            with self._lock:
                abandoned = member in self._making
                if abandoned:
                    self._cancelled.add(member)
                    self._lock.notify_all()
        if abandoned:
            self._report(ThreadLeft())

    def _call(self, member: int, factory: Callable[[], Any]) -> Any:
        """Call a factory.

        Raises:
            TimeoutError: it took too long.
        """
        if not self._can_abandon:
            return factory()
        with self._lock:
            self._making.add(member)
            self._cancelled.discard(member)
        made = run_in_thread(factory, "aioinfer-make")
        made.add_done_callback(self._notify)
        with self._lock:
            self._lock.wait_for(lambda: made.done() or member in self._cancelled or self._stopping)
            self._making.discard(member)
        if not made.done():
            made.add_done_callback(self._close_late)
            raise TimeoutError(f"environment {member} was not made in time")
        return made.result()

    def _notify(self, _: object) -> None:
        with self._lock:
            self._lock.notify_all()

    # -- end -------------------------------------------------------------------------------------------

    def _close_late(self, made: Any) -> None:
        """Close what a factory has returned that was not waited for."""
        if made.exception() is None:
            self._close(made.result())

    def _close_unused(self) -> None:
        while self._unused:
            self._close(self._unused.pop())

    def _close(self, env: Any) -> None:
        """Close an environment that no group has."""
        try:
            closing = env.close() if hasattr(env, "close") else None
            if not inspect.isawaitable(closing):
                return
            if self._loop is None or self._loop.is_closed():
                asyncio.run(_wait_for(closing))
            else:
                asyncio.run_coroutine_threadsafe(_wait_for(closing), self._loop).result()
        except BaseException:  # code of the user's may raise anything
            _log.warning("close() of an environment raised", exc_info=True)

    def join(self, timeout: float | None, *, hung: Set[int] = frozenset()) -> bool:
        """After :class:`Stop`: wait until all groups have ended, but for those that hang; returns whether all have."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._has_made.wait(timeout) and self._unused:
            closed = run_in_thread(self._close_unused, "aioinfer-close")
            with suppress(TimeoutError):
                closed.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        ended = []
        for number, group in enumerate(self._groups):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended.append(group.join(0.0 if number in hung else left))
        for client in self._clients:
            client.close()
        if self._own_loop is not None:
            self._own_loop.call_soon_threadsafe(self._own_loop.stop)
            self._own_loop = None
        return all(ended)


async def _wait_for(closing: Awaitable[Any]) -> None:
    await closing
