"""An environment whose reset and step are coroutine functions: a robot, a browser, a game server. Each is a task."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from tensordict import TensorDict, TensorDictBase

from aioinfer.client import AsyncInferenceClient
from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.group import Episodes, ReportingGroup, as_failure, as_message
from aioinfer.collectors.messages import Failed, MemberReady
from aioinfer.collectors.policy_caller import PolicyCaller
from aioinfer.collectors.spaces import (
    InfoKeys,
    action_columns,
    env_layout,
    info_columns,
    observation_columns,
    row_action_writer,
)
from aioinfer.collectors.watch import Phase, Watch
from aioinfer.collectors.writer import FragmentWriter
from aioinfer.errors import ServerOverloadedError
from aioinfer.interaction_type import InteractionType, requests_carry

__all__ = ["EnvTask", "TaskStepper"]


class TaskStepper:
    """One asynchronous environment, and what it returns as arrays of one row.

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
        self._actions = row_action_writer(env.action_space)
        self._random = RandomActions(action_columns(env.action_space), [env.action_space])
        self.member_of_row = np.zeros(1, np.int64)
        self.observations = [column.empty(1) for column in self._columns]
        self.next_observations = [column.empty(1) for column in self._columns]
        self.info = [column.empty(1) for column in self._info_columns]
        self.is_init = np.ones(1, np.bool_)
        self.reward = np.zeros(1, np.float32)
        self.terminated, self.truncated = np.zeros(1, np.bool_), np.zeros(1, np.bool_)

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
        """What the environment takes."""
        return self._actions(leaves)[0]

    def observe(self, observation: Any) -> None:
        """Take the first observation of an episode."""
        for column, out in zip(self._columns, self.observations, strict=True):
            column.put(observation, out, 0)
        self.is_init[0] = True

    def read(self, result: Any) -> bool:
        """Take what a step has returned; returns whether the episode has ended."""
        observation, reward, terminated, truncated, info = result
        for column, out in zip(self._columns, self.next_observations, strict=True):
            column.put(observation, out, 0)
        for column, out in zip(self._info_columns, self.info, strict=True):
            column.put(info, out, 0)
        self.reward[0] = reward
        self.terminated[0], self.truncated[0] = bool(terminated), bool(truncated) and not terminated
        self.is_init[0] = False
        for out, value in zip(self.observations, self.next_observations, strict=True):
            out[0] = value[0]
        return bool(terminated or truncated)


class EnvTask(ReportingGroup):
    """Steps one asynchronous environment in a task.

    Any thread may call the public methods; the rest is the event loop's.

    Args:
        stepper: the environment.
        loop: where the task runs.
        client: reaches the policy.
        members: its number as a member, alone in a list; so are the following.
        envs: its number.
        seeds: of its first episode.
        caller: makes its requests.
        writer: writes into the ring.
        episodes: counts them.
        random_steps: how many steps it makes at random first.
        mode: the exploration mode of requests.
        report: called with messages for the collector.
    """

    def __init__(
        self,
        stepper: TaskStepper,
        *,
        loop: asyncio.AbstractEventLoop,
        client: AsyncInferenceClient,
        members: Sequence[int],
        envs: Sequence[int],
        seeds: Sequence[int],
        caller: PolicyCaller,
        writer: FragmentWriter,
        episodes: Episodes,
        random_steps: Sequence[int],
        mode: str | None,
        report: Callable[[Any], None],
    ) -> None:
        super().__init__(envs, writer, report)
        self.stepper = stepper
        self.members = list(members)
        self._loop = loop
        self._client = client
        self._seed = seeds[0]
        self._caller = caller
        self._episodes = episodes
        self._watch = stepper.watch
        self._random_left = random_steps[0]
        self._mode = mode
        self._rows = np.zeros(1, np.int64)
        self._inbox: deque[Callable[[], Any]] = deque()
        self._wake = asyncio.Event()
        self._paused = self._timed_out = self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None  # cancelled before it has begun, it would close nothing
        self._ended = threading.Event()

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

    def grant(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let the environment write its next fragments to rows of the ring."""
        self._tell(lambda: self._take_grants(pairs))

    def pause(self, on_parked: Callable[[], None]) -> None:
        """Stop between two steps; ``on_parked`` is called by the task."""
        self._tell(lambda: self._set_paused(on_parked))

    def resume(self) -> None:
        """Go on."""
        self._tell(self._set_resumed)

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
            self._loop.call_soon_threadsafe(job, *arguments)
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
            if self._paused or not (self._present[0] and self._writer.has_row[0]):
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
        self._episodes.begin(self._rows)
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
        self._watch.begin(0, phase)
        result, error = None, None
        try:
            result = await call
        except BaseException as raised:
            error = raised
        if task is None or self._task is not task:  # it was left behind, another one has taken its place
            raise asyncio.CancelledError
        timed_out, self._timed_out = self._timed_out, False
        self._watch.end()
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
        stepper, writer, watch = self.stepper, self._writer, self._watch
        began = monotonic()
        request = self._caller.request(None)
        writer.write_request(
            None,
            stepper.observations,
            self._caller.states,
            stepper.is_init,
            self._episodes.number,
            self._episodes.steps,
        )
        if self._random_left:
            self._random_left -= 1
            actions = stepper.random_action()
            writer.write_reply(None, actions, -1, True)
        else:
            received, versions = self._caller.read(await self._act(request), None)
            writer.write_reply(None, received, versions, False)
            actions = received[: len(stepper.layout.action)]
        acted = monotonic()
        try:
            ended = stepper.read(await self._call(Phase.STEP, stepper.env.step(stepper.action(actions))))
        except Exception as error:
            await self._fail(error)
            return
        stepped = monotonic()
        watch.seconds[1] += acted - began
        watch.seconds[0] += stepped - acted
        watch.frames[0] += 1
        progress = self._progress
        progress.finished.extend(
            writer.write_step(
                None, stepper.next_observations, stepper.info, stepper.reward, stepper.terminated, stepper.truncated
            )
        )
        over = stepper.terminated | stepper.truncated
        progress.episodes.extend(self._episodes.step(self._rows, stepper.reward, over))
        if watch.frames[0] % _STEPS_PER_SAMPLE == 0:
            progress.step_seconds.append((self.envs[0], stepped - acted))
        if ended:
            try:
                await self._reset(None)
            except Exception as error:
                await self._fail(error)
                return
        if writer.may_ask:
            self._ask()

    async def _act(self, request: TensorDict) -> TensorDictBase:
        """Ask the policy; where the queue of the server is full, again in a moment."""
        while True:
            # Not in force while this is suspended: a mode belongs to the thread, and so to all tasks of its event loop.
            with nullcontext() if self._mode is None else requests_carry(InteractionType(self._mode)):
                reply = self._client.submit(request)
            try:
                return await reply
            except ServerOverloadedError:
                await asyncio.sleep(_RETRY_SECONDS)

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
        self._episodes.begin(self._rows)
        self._report(MemberReady(self.members[0]))
        self._ask()

    def _set_paused(self, on_parked: Callable[[], None]) -> None:
        self._paused = True
        on_parked()

    def _set_resumed(self) -> None:
        self._paused = False


_STEPS_PER_SAMPLE = 16
_RETRY_SECONDS = 0.002
