"""What a group steps: the interface, calls that another thread can take over, and what becomes of members that fail."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aioinfer.collectors.environments.random_actions import RandomActions
from aioinfer.collectors.spaces import Column, EnvLayout
from aioinfer.collectors.watch import Phase, Watch

__all__ = ["FAILED", "NO_ROWS", "Abandoned", "Stepper"]

_log = logging.getLogger("aioinfer")

FAILED: Any = object()
"""What a call returns that has failed."""

NO_ROWS: NDArray[np.int64] = np.empty(0, np.int64)


class Abandoned(Exception):
    """Another thread has taken over the environments while this one was inside a call; it must not use them again."""


class Stepper(ABC):
    """Environments that one thread steps, as rows ``0 .. size-1``.

    All arrays belong to the stepper, which writes them again in the next :meth:`reset`, :meth:`step` or
    :meth:`replace`. One thread at a time calls the methods, but for :meth:`take_over`, which another thread calls while
    the first one is inside an environment's code.

    Attributes:
        is_uneven: whether some rows may make fewer steps than others in the same number of calls.
        size: rows.
        layout: of one row.
        members: how many objects these environments are. One fails, and is replaced, as a whole.
        member_of_row: int64 ``[size]``.
        min_rows: how many rows must have an action, or be in a reset, before any of them steps: more than one where an
            object steps several at once. A row that has its action is not ``ready`` while it waits for the others.
        observations: ``[size, *shape]`` for each leaf of ``layout.observation``, what the policy is asked with next.
        is_init: bool ``[size]``, whether that observation is the first of an episode.
        ready: int64 ``[m]``, ascending, the rows that wait for an action.
        stepped: int64 ``[k]``, the rows that have completed a step since the last call. The arrays below are valid for
            these.
        next_observations: ``[size, *shape]`` for each leaf, what the step returned, before any reset.
        reward: float32 ``[size]``.
        terminated: bool ``[size]``.
        truncated: bool ``[size]``; false where ``terminated`` is set too.
        info: ``[size, *shape]`` for each leaf of ``layout.info``, NaN (or 0 if it is no float) where an info lacks it.
        failures: the members that have failed in the last call, with what they raised. A :class:`ValueError` says that
            an environment returned something of another layout than its spaces have, a :class:`TimeoutError` that
            :meth:`take_over` took it. Their rows are not ``ready`` until :meth:`replace` puts others in their place.
        sample: one of the rows stepped, another one each time, and the seconds that its own step took.
    """

    min_rows = 1
    is_uneven = False

    def __init__(
        self, envs: Sequence[Any], rows: Sequence[int], layout: EnvLayout, watch: Watch, random: RandomActions
    ) -> None:
        self.layout = layout
        self.members = len(envs)
        self.member_of_row: NDArray[np.int64] = np.repeat(np.arange(self.members), rows)
        self.size = size = len(self.member_of_row)
        self._first_row: list[int] = np.concatenate([[0], np.cumsum(rows)]).tolist()
        self.observations = [Column(spec).empty(size) for spec in layout.observation]
        self.next_observations = [Column(spec).empty(size) for spec in layout.observation]
        self.info = [Column(spec).empty(size) for spec in layout.info]
        self.is_init = np.zeros(size, np.bool_)
        self.reward = np.zeros(size, np.float32)
        self.terminated = np.zeros(size, np.bool_)
        self.truncated = np.zeros(size, np.bool_)
        self.ready = NO_ROWS
        self.stepped = NO_ROWS
        self.failures: list[tuple[int, BaseException]] = []
        self.sample: tuple[int, float] = (0, 0.0)
        self._watch = watch
        self._envs: list[Any] = list(envs)  # None: failed and closed, or hung
        self._random = random
        self._ready_changed = True
        # The call under way, by when it began. Who removes it owns the stepper: the thread that called, or another one.
        self._calls: dict[float, int] = {}
        self._taken: tuple[int, float] = (0, 0.0)
        # What is left of an operation is in iterators, so that another thread goes on where a call hangs.
        self._go_on: Callable[[], None] = self._finish
        self._to_close: Iterator[int] = iter(())

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> None:
        """Begin the first episode of each row with its seed. After it they are ``ready``, but for those that failed."""

    @abstractmethod
    def step(self, rows: NDArray[np.int64], actions: Sequence[NDArray[Any]]) -> None:
        """Step some of the ``ready`` rows, and reset those that end.

        Args:
            rows: ascending.
            actions: ``[len(rows), *shape]`` for each leaf of ``layout.action``.
        """

    def random_actions(self, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Draw actions of the action spaces, ``[len(rows), *shape]`` for each leaf: a sequence for each row's seed."""
        return self._random.draw(rows)

    @abstractmethod
    def replace(self, member: int, env: Any, seeds: Sequence[int]) -> None:
        """Put another environment in the place of a member, and reset it with a seed for each of its rows.

        If its layout is another one, or it fails, that is in ``failures``.
        """

    def take_over(self, seconds: float = 0.0) -> int | None:
        """Take the environments from a thread that is inside a call of one of them. It gets :class:`Abandoned`.

        The thread that took them calls :meth:`resume` next.

        Args:
            seconds: how long the call must have taken.

        Returns:
            The member that was called; ``None`` if there is no such call, or it has just returned.
        """
        for since in list(self._calls):
            elapsed = monotonic() - since
            if elapsed >= seconds and (member := self._calls.pop(since, None)) is not None:
                self._taken = member, elapsed
                return member
        return None

    def resume(self) -> None:
        """Let the member that was taken over fail, and do the rest of the operation that it was called in."""
        member, elapsed = self._taken
        phase = Phase(int(self._watch.phase[0]))
        self._envs[member] = None
        if phase is Phase.CLOSE:
            _log.warning("close() of an environment has not returned for %.1f s", elapsed)
        else:
            name = "reset" if phase is Phase.RESET else "step"
            self._fail(member, TimeoutError(f"{name}() has not returned for {elapsed:.1f} s"))
        self._go_on()

    def close(self) -> None:
        """Close every environment; what that raises is logged."""
        self._begin()
        self._close_all(range(self.members))

    def _begin(self) -> None:
        self.failures = []
        self.stepped = NO_ROWS

    def _call(self, member: int, phase: Phase, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call an environment; :data:`FAILED` if it raises, which is noted then."""
        self._watch.begin(member, phase)
        since = float(self._watch.since[0])
        self._calls[since] = member
        try:
            result = function(*args, **kwargs)
            del self._calls[since]
        except BaseException as error:  # code of the user's may raise anything
            if self._calls.pop(since, None) is None:
                raise Abandoned from None
            if phase is Phase.CLOSE:
                _log.warning("close() of an environment raised", exc_info=error)
            else:
                self._fail(member, error)
            return FAILED
        return result

    def _fail(self, member: int, error: BaseException) -> None:
        if error.__traceback__ is not None:  # without the frame of this file, which would keep the stepper alive
            error.__traceback__ = error.__traceback__.tb_next
        self.failures.append((member, error))
        self._ready_changed = True

    def _finish(self) -> None:
        """Close what has failed, and say which rows wait for an action."""
        if self.failures:
            self._close_all(sorted({member for member, _ in self.failures}))
        else:
            self._settle()

    def _close_all(self, members: Sequence[int]) -> None:
        self._to_close = iter([member for member in members if self._envs[member] is not None])
        self._ready_changed = True
        self._go_on = self._close_rest
        self._close_rest()

    def _close_rest(self) -> None:
        for member in self._to_close:
            env, self._envs[member] = self._envs[member], None
            if hasattr(env, "close"):
                self._call(member, Phase.CLOSE, env.close)
        self._settle()

    def _settle(self) -> None:
        if self._ready_changed:
            self.ready = self._waiting_rows()
            self._ready_changed = False
        self._watch.end()

    def _waiting_rows(self) -> NDArray[np.int64]:
        """The rows that wait for an action, of members that have not failed."""
        alive = np.array([env is not None for env in self._envs], np.bool_)
        return np.flatnonzero(alive[self.member_of_row])

    def _rows_of(self, member: int) -> range:
        return range(self._first_row[member], self._first_row[member + 1])
