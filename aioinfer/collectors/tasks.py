"""An environment whose reset and step are coroutine functions: a robot, a browser, a game server. Each is a task."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any

import numpy as np

from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.group import ReportingGroup, as_failure, as_message
from aioinfer.collectors.messages import Failed, MemberReady
from aioinfer.collectors.row_writer import RowWriter
from aioinfer.collectors.spaces import (
    Column,
    EnvLayout,
    InfoKeys,
    action_columns,
    env_layout,
    info_columns,
    observation_columns,
    single_action_writer,
)
from aioinfer.collectors.task_policy import TaskPolicy
from aioinfer.collectors.watch import ControlBlock, Phase, Watch

__all__ = ["EnvTask", "Episode", "TaskRows", "TaskStepper"]


class TaskRows:
    """The latest observations of asynchronous environments, a row of each.

    Args:
        layout: of the environments.
        size: how many there are.

    Attributes:
        observations: ``[size, *shape]`` for each leaf.
        is_init: ``[size]``: whether each is the first of an episode.
    """

    def __init__(self, layout: EnvLayout, size: int) -> None:
        self.observations = [Column(spec).empty(size) for spec in layout.observation]
        for observation, example in zip(self.observations, layout.example, strict=True):
            observation[:] = example  # which the policy can be tried with
        self.is_init = np.ones(size, np.bool_)


class TaskStepper:
    """One asynchronous environment, and what it returns.

    Args:
        env: has ``observation_space``, ``action_space``, ``async def reset(*, seed)`` and ``async def step(action)``,
            which return what those of Gymnasium return.
        watch: says what it does.
        info_keys: see :func:`env_layout`.
    """

    is_uneven = False
    size = 1

    def __init__(self, env: Any, watch: Watch, info_keys: InfoKeys) -> None:
        self.env = env
        self.watch = watch
        self.layout = env_layout(env.observation_space, env.action_space, info_keys)
        self._columns = observation_columns(env.observation_space)
        self._info_columns = info_columns(self.layout.info)
        self._info_keys = info_keys
        self._actions = single_action_writer(env.action_space)
        self._random = RandomActions(action_columns(env.action_space), [env.action_space])
        self.rows, self.row = TaskRows(self.layout, 1), 0
        self.info = [column.empty(1) for column in self._info_columns]
        self._reward = np.zeros(1, np.float32)
        self.reward, self.terminated, self.truncated = 0.0, False, False

    def share(self, rows: TaskRows, row: int) -> None:
        """Let the observations be in a row of others."""
        self.rows, self.row = rows, row

    def replace(self, env: Any) -> None:
        """Put another environment in the place of this one.

        Raises:
            ValueError: its spaces are others.
        """
        self.env = env
        if env_layout(env.observation_space, env.action_space, self._info_keys) != self.layout:
            raise ValueError("the spaces of the environment are not those that it had before")

    def seed(self, seed: int) -> None:
        """Seed the actions that are chosen at random."""
        self._random.seed(0, seed, self.env.action_space)

    def random_action(self) -> list[Any]:
        """An action of the environment's space."""
        return self._random.draw(np.zeros(1, np.int64))

    def action(self, leaves: Sequence[Any]) -> Any:
        """What the environment takes, of leaves ``[*shape]``."""
        return self._actions(leaves)

    def observe(self, observation: Any) -> None:
        """Take the first observation of an episode."""
        for column, out in zip(self._columns, self.rows.observations, strict=True):
            column.put(observation, out, self.row)
        self.rows.is_init[self.row] = True

    def read(self, result: Any) -> None:
        """Take what a step has returned."""
        observation, reward, terminated, truncated, info = result
        for column, out in zip(self._columns, self.rows.observations, strict=True):
            column.put(observation, out, self.row)
        for column, out in zip(self._info_columns, self.info, strict=True):
            column.put(info, out, 0)
        self._reward[0] = reward
        self.reward = self._reward.item()
        self.terminated, self.truncated = bool(terminated), bool(truncated) and not terminated
        self.rows.is_init[self.row] = False


class Episode:
    """Counts the episodes of one environment, and adds up their returns.

    Args:
        env: its number.
        block: has the number of episodes that it has begun.

    Attributes:
        number: of the current episode, which no other episode of the collector has.
        steps: how many steps of it were made.
    """

    def __init__(self, env: int, block: ControlBlock) -> None:
        self._env = env
        self._block = block
        self.number, self.steps, self._return = 0, 0, 0.0

    def begin(self) -> None:
        """Begin an episode."""
        self.number = int(self._block.begin_episodes(self._env))
        self.steps, self._return = 0, 0.0

    def step(self, reward: float, ended: bool) -> list[tuple[int, float, int]]:
        """Count a step; returns the episode that it has ended: environment, return, steps."""
        self.steps += 1
        self._return += reward
        if not ended:
            return []
        found = (self._env, self._return, self.steps)
        self.begin()
        return [found]


class EnvTask(ReportingGroup):
    """Steps one asynchronous environment in a task.

    Any thread may call the public methods; the rest is the event loop's.

    Args:
        stepper: the environment.
        loop: where the task runs.
        policy: computes its actions.
        members: its number as a member, alone in a list; so are the following.
        envs: its number.
        seeds: of its first episode.
        writer: writes into the ring.
        episode: counts them.
        random_steps: how many steps it makes at random first.
        report: called with messages for the collector.
    """

    def __init__(
        self,
        stepper: TaskStepper,
        *,
        loop: asyncio.AbstractEventLoop,
        policy: TaskPolicy,
        members: Sequence[int],
        envs: Sequence[int],
        seeds: Sequence[int],
        writer: RowWriter,
        episode: Episode,
        random_steps: int,
        report: Callable[[Any], None],
    ) -> None:
        super().__init__(envs, writer, report)
        self.stepper = stepper
        self.members = list(members)
        self._loop = loop
        self._policy = policy
        self._seed = seeds[0]
        self._steps = writer
        self._episode = episode
        self._watch = stepper.watch
        self._random_left = random_steps
        self._num_actions = len(stepper.layout.action)
        self._inbox: deque[Callable[[], Any]] = deque()
        self._wake = asyncio.Event()
        self._timed_out = self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None  # cancelled before it has begun, it would close nothing
        self._ended = threading.Event()
        # Elements of arrays, which numpy reads and adds to in four times as long.
        self._is_present, self._has_row = self._present.data, writer.has_row.data
        watch = stepper.watch
        self._since: Any = watch.since.data
        self._phase: Any = watch.phase.data
        self._seconds: Any = watch.seconds.data
        self._frames: Any = watch.frames.data

    # -- any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the task."""
        self._call_soon(self._start_task)

    def stop(self) -> None:
        """Cancel the task, which closes the environment."""
        self._stopping = True
        if not self._call_soon(self._cancel):
            self._ended.set()  # the loop is closed, and its tasks are gone

    def join(self, timeout: float | None) -> bool:
        """Wait for the task to end; returns whether it has."""
        return self._ended.wait(timeout)

    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None:
        """Put a new environment in the place of the one that has failed."""
        self._tell(lambda: self._replace(env, seeds[0]))

    def abandon(self, seconds: float) -> bool:
        """Cancel a call that takes longer than that. Where that was done before, its task is left behind, no thread."""
        self._call_soon(self._cancel_call, seconds)
        return False

    def _tell(self, job: Callable[[], Any]) -> None:
        self._call_soon(self._take_job, job)

    def _call_soon(self, job: Callable[..., None], *arguments: Any) -> bool:
        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:  # none runs
            is_here = False
        try:
            # On the loop's own thread there is nobody to wake, which takes a tenth of the time of a step.
            (self._loop.call_soon if is_here else self._loop.call_soon_threadsafe)(job, *arguments)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # -- the event loop --------------------------------------------------------------------------------

    def _start_task(self) -> None:
        self._new_task(self._begin)

    def _new_task(self, first: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._task = self._loop.create_task(self._run(first), name="aioinfer-env")

    def _take_job(self, job: Callable[[], Any]) -> None:
        self._inbox.append(job)
        self._wake.set()

    def _cancel(self) -> None:
        if self._task is None:
            self._ended.set()
        elif self._running is self._task:
            self._task.cancel()

    def _cancel_call(self, seconds: float) -> None:
        watch = self._watch
        if self._task is None or watch.phase[0] == Phase.IDLE or monotonic() - watch.since[0] < seconds:
            return
        if not self._timed_out:
            self._timed_out = True
            self._task.cancel()
            return
        # It has been cancelled before, and goes on: its task is left behind.
        self._task.cancel()
        self._timed_out = False
        watch.end()
        self._new_task(partial(self._fail, self._timeout()))

    async def _run(self, first: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._running = task = self._task
        try:
            if not self._stopping:
                await first()
            await self._run_until_stopped()
        except asyncio.CancelledError:
            if self._task is task and not self._stopping:  # not by us: the program has ended its event loop
                self._report(Failed(as_message(RuntimeError(f"the task of environment {self.envs[0]} was cancelled"))))
        except BaseException as error:
            if self._task is task:
                self._report(Failed(as_message(error)))
        finally:
            if self._task is task:
                await self._close()
                self._ended.set()

    async def _run_until_stopped(self) -> None:
        while not self._stopping:
            while self._inbox:
                result = self._inbox.popleft()()
                if inspect.isawaitable(result):
                    await result
            if self._paused or not (self._is_present[0] and self._has_row[0]):
                self._watch.begin_wait()
                self._wake.clear()
                await self._wake.wait()
                self._watch.end_wait()
                continue
            await self._step()

    async def _begin(self) -> None:
        try:
            self.stepper.seed(self._seed)
            await self._reset(self._seed)
        except Exception as error:
            await self._fail(error)
            return
        self._present[0] = True
        self._episode.begin()
        self._ask()

    async def _reset(self, seed: int | None) -> None:
        observation, _ = await self._call(Phase.RESET, self.stepper.env.reset(seed=seed))
        self.stepper.observe(observation)

    async def _call(self, phase: Phase, call: Any) -> Any:
        """Await a call of the environment.

        Raises:
            TimeoutError: it took too long, and was cancelled.
        """
        task = self._task
        self._since[0] = monotonic()
        self._phase[0] = phase  # of member 0, the only one
        result, error = None, None
        try:
            result = await call
        except BaseException as raised:
            error = raised
        if task is None or self._task is not task:  # it was left behind, another one has taken its place
            raise asyncio.CancelledError
        timed_out, self._timed_out = self._timed_out, False
        self._phase[0] = Phase.IDLE
        if timed_out:
            task.uncancel()
            if isinstance(error, asyncio.CancelledError) and not self._stopping:
                raise self._timeout()
        if isinstance(error, asyncio.CancelledError) and not task.cancelling():
            raise RuntimeError(f"environment {self.envs[0]} was cancelled by itself") from error
        if error is not None:
            raise error
        return result

    def _timeout(self) -> TimeoutError:
        return TimeoutError(f"environment {self.envs[0]} did not return in time")

    async def _step(self) -> None:
        stepper, writer, episode = self.stepper, self._steps, self._episode
        began = monotonic()
        states = self._policy.begin(stepper.row)
        observations, is_init = stepper.rows.observations, bool(stepper.rows.is_init[stepper.row])
        writer.begin_step(observations, states, is_init, episode.number, episode.steps)
        received: Sequence[Any]
        if self._random_left:
            self._random_left -= 1
            received, index, version = stepper.random_action(), 0, -1
            writer.write_actions(received, index, version, True)
        else:
            received, index, version = await self._policy(stepper.row)
            writer.write_actions(received, index, version, False)
        actions = [leaf[index] for leaf in received[: self._num_actions]]
        acted = monotonic()
        try:
            stepper.read(await self._call(Phase.STEP, stepper.env.step(stepper.action(actions))))
        except Exception as error:
            await self._fail(error)
            return
        stepped = monotonic()
        seconds, frames = self._seconds, self._frames[0] + 1
        seconds[1] += acted - began
        seconds[0] += stepped - acted
        self._frames[0] = frames
        progress = self._progress
        ended = stepper.terminated or stepper.truncated
        progress.finished.extend(
            writer.end_step(observations, stepper.info, stepper.reward, stepper.terminated, stepper.truncated)
        )
        progress.episodes.extend(episode.step(stepper.reward, ended))
        if frames % _STEPS_PER_SAMPLE == 0:
            progress.step_seconds.append((self.envs[0], stepped - acted))
        if ended:
            try:
                await self._reset(None)
            except Exception as error:
                await self._fail(error)
                return
        if writer.may_ask:
            self._ask()

    async def _fail(self, error: BaseException) -> None:
        self._present[0] = False
        self._progress.finished.extend(self._writer.cut(0))
        self._send()
        await self._close()
        self._report(as_failure(self.members[0], error))

    async def _close(self) -> None:
        env = self.stepper.env
        if env is None:
            return
        self.stepper.env = None
        with suppress(Exception):  # it may have failed before
            closing = env.close() if hasattr(env, "close") else None
            if inspect.isawaitable(closing):
                await self._call(Phase.CLOSE, closing)

    # -- jobs of the inbox -----------------------------------------------------------------------------

    async def _replace(self, env: Any, seed: int) -> None:
        try:
            self.stepper.replace(env)
            self.stepper.seed(seed)
            await self._reset(seed)
        except Exception as error:
            await self._fail(error)
            return
        self._present[0] = True
        self._episode.begin()
        self._report(MemberReady(self.members[0]))
        self._ask()


_STEPS_PER_SAMPLE = 16
