"""A group of environments that one thread steps: ask the policy, step, write into the ring, and again."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.environments import Abandoned, Stepper
from aioinfer.collectors.messages import Failed, MemberFailed, MemberReady, Progress
from aioinfer.collectors.policy_caller import Policy, PolicyCaller
from aioinfer.collectors.watch import ControlBlock, Watch
from aioinfer.collectors.writer import FragmentWriter
from aioinfer.errors import ClientClosedError, describe
from aioinfer.interaction_type import InteractionType, requests_carry
from aioinfer.ipc.pickling import dump_exception

__all__ = ["EnvGroup", "Episodes", "ReportingGroup", "as_failure", "as_message"]

Array: TypeAlias = NDArray[Any]


class Episodes:
    """Counts the episodes of a group's environments, and adds up their returns. One thread's, or one task's.

    Args:
        envs: the numbers of the environments.
        block: has the number of episodes that each has begun.

    Attributes:
        number: ``[size]``: the current episode of each, a number that no other episode of the collector has.
        steps: ``[size]``: how many steps of it were made.
    """

    def __init__(self, envs: Sequence[int], block: ControlBlock) -> None:
        self._envs = np.array(envs, np.int64)
        self._block = block
        self.number = np.zeros(len(envs), np.int64)
        self.steps = np.zeros(len(envs), np.int64)
        self._returns = np.zeros(len(envs), np.float64)

    def begin(self, rows: Array) -> None:
        """Begin an episode in each of these environments of the group."""
        self.number[rows] = self._block.begin_episodes(self._envs[rows])
        self.steps[rows] = 0
        self._returns[rows] = 0.0

    def step(self, rows: Array | None, reward: Array, ended: Array) -> list[tuple[int, float, int]]:
        """Count a step of these, or of all; returns the episodes that it has ended: environment, return, steps."""
        chosen: Any = slice(None) if rows is None else rows
        self.steps[chosen] += 1
        self._returns[chosen] += reward[chosen]
        over = np.flatnonzero(ended) if rows is None else rows[ended[rows]]
        if not len(over):
            return []
        found = list(
            zip(self._envs[over].tolist(), self._returns[over].tolist(), self.steps[over].tolist(), strict=True)
        )
        self.begin(over)
        return found


class ReportingGroup(ABC):
    """What groups of both kinds tell the collector, and what they do with the rows that it grants.

    Args:
        envs: the number of each environment.
        writer: writes into the ring.
        report: called with messages for the collector.

    Attributes:
        envs: as given.
    """

    def __init__(self, envs: Sequence[int], writer: FragmentWriter, report: Callable[[Any], None]) -> None:
        self.envs = list(envs)
        self._index = {env: index for index, env in enumerate(envs)}
        self._writer = writer
        self._report = report
        self._present = np.zeros(len(self.envs), np.bool_)
        self._progress = Progress([], [], [], [])
        self._paused = False

    @abstractmethod
    def _tell(self, job: Callable[[], Any]) -> None:
        """Have the thread or task of the group do something between two steps. Any thread."""

    def grant(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let environments write their next fragments to rows of the ring. Those that wait step on together."""
        self._tell(lambda: self._take_grants(pairs))

    def pause(self, on_parked: Callable[[], None]) -> None:
        """Stop between two steps; ``on_parked`` is called then."""
        self._tell(lambda: self._set_paused(on_parked))

    def resume(self) -> None:
        """Go on."""
        self._tell(self._set_resumed)

    def _set_paused(self, on_parked: Callable[[], None]) -> None:
        self._paused = True
        on_parked()

    def _set_resumed(self) -> None:
        self._paused = False

    def _ask(self) -> None:
        self._progress.asking.extend(self._writer.asking(self._present))
        self._send()

    def _send(self) -> None:
        if any(self._progress):
            progress, self._progress = self._progress, Progress([], [], [], [])
            self._report(progress)

    def _take_grants(self, pairs: Sequence[tuple[int, int]]) -> None:
        for env, row in pairs:
            index = self._index[env]
            if self._present[index]:
                self._writer.grant(index, row)
            else:  # it has failed since it asked: nothing is in the row
                self._progress.finished.append((env, row))
        self._send()


class EnvGroup(ReportingGroup):
    """Steps environments in a thread of its own, each as soon as it has an action and a row of the ring.

    The thread owns everything but the inbox. ``abandon`` gives all of it to another thread, while the first one is
    inside an environment's call that does not return.

    Args:
        stepper: the environments.
        members: the number of each of the stepper's members.
        envs: the number of each environment.
        seeds: of the first episodes.
        caller: makes the requests.
        policy: answers them.
        writer: writes into the ring.
        episodes: of the environments.
        watch: says what the group does.
        random_steps: how many steps each environment makes at random first.
        mode: the exploration mode of requests.
        report: called with messages for the collector.
    """

    def __init__(
        self,
        stepper: Stepper,
        *,
        members: Sequence[int],
        envs: Sequence[int],
        seeds: Sequence[int],
        caller: PolicyCaller,
        policy: Policy,
        writer: FragmentWriter,
        episodes: Episodes,
        watch: Watch,
        random_steps: Sequence[int],
        mode: str | None,
        report: Callable[[Any], None],
    ) -> None:
        super().__init__(envs, writer, report)
        self.stepper = stepper
        self.members = list(members)
        self.watch = watch
        self._seeds = list(seeds)
        self._caller = caller
        self._policy = policy
        self._episodes = episodes
        self._random_left = np.array(random_steps, np.int64)
        self._any_random = bool(self._random_left.any())
        self._mode = mode
        self._everyone = np.arange(stepper.size)
        self._samples = 0
        self._has_begun = False
        # Other threads append to the inbox and notify; the group's thread takes what is there.
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = self._new_thread(self._begin)

    # -- any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Have the thread close the environments, and end."""
        self._tell(self._set_stopping)

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread to end; returns whether it has. One that was never started closes them here."""
        if self._thread.ident is None:
            self.stepper.close()
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None:
        """Put a new environment in the place of a member that has failed."""
        self._tell(lambda: self._replace(member, env, seeds))

    def abandon(self, seconds: float) -> bool:
        """Leave the thread behind, if an environment's call takes longer than that, and go on in another one."""
        if self.stepper.take_over(seconds) is None:
            return False
        self._thread = self._new_thread(self._resume)
        self._thread.start()
        return True

    def _tell(self, job: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(job)
            self._wake.notify()

    def _new_thread(self, first: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=self._run, args=(first,), name="aioinfer-group", daemon=True)

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self, first: Callable[[], None]) -> None:
        try:
            with self._carrying_mode():
                self._loop(first)
        except Abandoned:
            return
        except ClientClosedError as error:
            if not self._stopping:
                self._report(Failed(as_message(error)))
        except BaseException as error:
            self._report(Failed(as_message(error)))
        self.stepper.close()
        self._policy.close()

    def _carrying_mode(self) -> AbstractContextManager[None]:
        return nullcontext() if self._mode is None else requests_carry(InteractionType(self._mode))

    def _loop(self, first: Callable[[], None]) -> None:
        first()
        while True:
            if self._inbox:
                self._read_inbox()
            if self._stopping:
                return
            rows = self._rows_to_step()
            if rows is None or self._paused:
                self._wait()
                continue
            self._step(rows)

    def _resume(self) -> None:
        """Go on with what the thread that was left behind has begun."""
        self.stepper.resume()
        if self._has_begun:
            self._finish_step()
        else:
            self._begin_episodes()

    def _begin(self) -> None:
        self.stepper.reset(self._seeds)
        self._begin_episodes()

    def _begin_episodes(self) -> None:
        self._has_begun = True
        self._present[:] = True
        self._episodes.begin(self._everyone)
        self._settle_failures()
        self._ask()

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _wait(self) -> None:
        self.watch.begin_wait()
        self._send()
        with self._wake:
            while not self._inbox:
                self._wake.wait()
        self.watch.end_wait()

    def _rows_to_step(self) -> Array | None:
        """The environments that have an observation and a row; ``None``: none has."""
        ready = self.stepper.ready
        has_row = self._writer.has_row[ready]
        if has_row.all():
            return ready if len(ready) else None
        return ready[has_row] if has_row.any() else None

    def _step(self, rows: Array) -> None:
        stepper, writer, caller, watch = self.stepper, self._writer, self._caller, self.watch
        chosen = None if len(rows) == stepper.size else rows
        began = monotonic()
        request = caller.request(chosen)
        writer.write_request(
            chosen,
            stepper.observations,
            caller.states,
            stepper.is_init,
            self._episodes.number,
            self._episodes.steps,
        )
        actions = self._act_at_random(rows) if self._any_random else self._act(request, chosen)
        acted = monotonic()
        stepper.step(rows, actions)
        watch.seconds[1] += acted - began
        watch.seconds[0] += monotonic() - acted
        self._finish_step()

    def _act(self, request: Any, rows: Array | None) -> list[Array]:
        received, versions = self._caller.read(self._policy(request), rows)
        self._writer.write_reply(rows, received, versions, False)
        return received[: self._num_actions]

    @property
    def _num_actions(self) -> int:
        return len(self.stepper.layout.action)

    def _act_at_random(self, rows: Array) -> list[Array]:
        """Choose actions at random where an environment has random steps left, and ask the policy for the others."""
        at_random = self._random_left[rows] > 0
        chosen, others = rows[at_random], rows[~at_random]
        found = self.stepper.random_actions(chosen) if len(chosen) else []
        self._random_left[chosen] -= 1
        self._any_random = bool(self._random_left.any())
        if len(chosen):
            self._writer.write_reply(chosen, found, -1, True)
        if not len(others):
            return found
        asked = self._act(self._caller.request(others), others)
        if not len(chosen):
            return asked
        both = []
        for of_policy, random in zip(asked, found, strict=True):
            actions = np.empty((len(rows), *of_policy.shape[1:]), of_policy.dtype)
            actions[at_random], actions[~at_random] = random, of_policy
            both.append(actions)
        return both

    def _finish_step(self) -> None:
        stepper = self.stepper
        stepped = stepper.stepped
        if len(stepped):
            chosen = None if len(stepped) == stepper.size else stepped
            finished = self._writer.write_step(
                chosen,
                stepper.next_observations,
                stepper.info,
                stepper.reward,
                stepper.terminated,
                stepper.truncated,
            )
            self._progress.finished.extend(finished)
            ended = stepper.terminated | stepper.truncated
            self._progress.episodes.extend(self._episodes.step(chosen, stepper.reward, ended))
            self.watch.frames[0] += len(stepped)
            self._sample()
        if stepper.failures:
            self._settle_failures()
        if self._writer.may_ask:
            self._ask()

    def _sample(self) -> None:
        self._samples += 1
        if self._samples % _STEPS_PER_SAMPLE == 0:
            index, seconds = self.stepper.sample
            self._progress.step_seconds.append((self.envs[index], seconds))

    def _settle_failures(self) -> None:
        failures, self.stepper.failures = self.stepper.failures, []
        for member, _ in failures:
            rows = np.flatnonzero(self.stepper.member_of_row == member)
            for index in rows.tolist():
                self._progress.finished.extend(self._writer.cut(index))
            self._present[rows] = False
        self._send()
        for member, error in failures:
            self._report(as_failure(self.members[member], error))

    # -- jobs of the inbox -----------------------------------------------------------------------------

    def _replace(self, number: int, env: Any, seeds: Sequence[int]) -> None:
        member = self.members.index(number)
        rows = np.flatnonzero(self.stepper.member_of_row == member)
        self.stepper.replace(member, env, seeds)
        if any(failed == member for failed, _ in self.stepper.failures):
            self._settle_failures()
            return
        self._present[rows] = True
        self._episodes.begin(rows)
        self._report(MemberReady(number))
        self._ask()

    def _set_stopping(self) -> None:
        self._stopping = True


def as_failure(member: int, error: BaseException) -> MemberFailed:
    """The message that a member has failed."""
    return MemberFailed(member, as_message(error))


def as_message(error: BaseException) -> bytes:
    """Pickle what the code of a user has raised, which may be anything."""
    return dump_exception(error if isinstance(error, Exception) else RuntimeError(describe(error)))


_STEPS_PER_SAMPLE = 16
