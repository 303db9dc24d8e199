"""What each group of environments does at the moment, in memory that a watcher in another process reads."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aioinfer.ipc.memory import AnonymousSharedMemory

__all__ = ["ControlBlock", "Overdue", "Phase", "Watch", "overdue"]

_RECORD = 64
"""The bytes of a group: a cache line of its own, for no other group's writes to slow it down."""


class Phase(IntEnum):
    """What a group has called and waits for."""

    IDLE = 0
    """Nothing of an environment: it waits for actions or for rows, or works itself."""
    MAKE = 1
    RESET = 2
    STEP = 3
    CLOSE = 4


class Watch:
    """What one group does, for others to see. Its thread alone writes, or whoever knows that the thread is gone.

    A loop that is in a hurry writes the arrays itself, as :meth:`begin` does: ``since`` first. So whoever sees another
    member, or another phase, also sees that it has just begun.

    Args:
        record: the group's bytes of a :class:`ControlBlock`; ``None`` for memory of its own.

    Attributes:
        member: int64 ``[1]``, the member that the group has called.
        phase: int64 ``[1]``, a :class:`Phase`.
        since: float64 ``[1]``, when that call began, of ``time.monotonic``, which all processes of a machine share.
        seconds: float64 ``[3]``, spent so far: stepping, waiting for the policy, and waiting for rows of the ring.
        waits_since: float64 ``[1]``, since when it waits for rows, which is not in ``seconds`` yet; 0 if it does not.
        frames: int64 ``[1]``, steps so far.
    """

    __slots__ = ("frames", "member", "phase", "seconds", "since", "waits_since")

    def __init__(self, record: NDArray[np.uint8] | None = None) -> None:
        record = np.zeros(_RECORD, np.uint8) if record is None else record
        integers, floats = record.view(np.int64), record.view(np.float64)
        self.member: NDArray[np.int64] = integers[0:1]
        self.phase: NDArray[np.int64] = integers[1:2]
        self.since: NDArray[np.float64] = floats[2:3]
        self.frames: NDArray[np.int64] = integers[3:4]
        self.seconds: NDArray[np.float64] = floats[4:7]
        self.waits_since: NDArray[np.float64] = floats[7:8]

    def begin(self, member: int, phase: Phase) -> None:
        """Say that ``member`` is called now."""
        self.since[0] = monotonic()
        self.member[0] = member
        self.phase[0] = phase

    def end(self) -> None:
        """Say that the call has returned."""
        self.phase[0] = 0

    def begin_wait(self) -> None:
        """Say that it waits for rows of the ring."""
        self.waits_since[0] = monotonic()

    def end_wait(self) -> None:
        """Say that it waits no longer."""
        self.seconds[2] += monotonic() - self.waits_since[0]
        self.waits_since[0] = 0.0

    def seconds_until(self, now: float) -> NDArray[np.float64]:
        """``seconds``, with those of what is under way."""
        seconds, phase, since, waits_since = self.seconds.copy(), self.phase[0], self.since[0], self.waits_since[0]
        if phase != Phase.IDLE:
            seconds[0] += max(0.0, now - since)
        if waits_since:
            seconds[2] += max(0.0, now - waits_since)
        return seconds


class ControlBlock:
    """The watches of all groups, and the counters of all environments.

    Args:
        num_groups: groups of all processes together.
        num_envs: environments of all groups together.
        descriptor: of the memory, where another process has made it with the same numbers; its own from now on.
        shared: whether other processes are to have it.

    Attributes:
        watches: of each group.
        episodes: int64 ``[num_envs]``, the episodes that each environment has begun so far.
        memory: by whose descriptor another process gets it; ``None`` if it is not shared.
    """

    def __init__(self, num_groups: int, num_envs: int, *, descriptor: int | None = None, shared: bool = True) -> None:
        nbytes = num_groups * _RECORD + num_envs * 8
        self.memory: AnonymousSharedMemory | None = None
        if descriptor is not None:
            self.memory = AnonymousSharedMemory(descriptor, nbytes, b"")
        elif shared:
            self.memory = AnonymousSharedMemory.create(nbytes)
        data = np.zeros(nbytes, np.uint8) if self.memory is None else np.frombuffer(self.memory.view, np.uint8)
        records = data[: num_groups * _RECORD].reshape(num_groups, _RECORD)
        self.watches = [Watch(record) for record in records]
        self.episodes: NDArray[np.int64] = data[num_groups * _RECORD :].view(np.int64)

    def begin_episodes(self, envs: Any) -> Any:
        """Count a new episode of an environment, or of each of several; returns numbers that no others have."""
        numbers = self.episodes[envs] * len(self.episodes) + envs
        self.episodes[envs] += 1
        return numbers


class Overdue(NamedTuple):
    """A member whose call takes longer than it may."""

    group: int
    member: int
    phase: Phase
    seconds: float
    """How long the call has taken so far."""


def overdue(
    watches: Sequence[Watch], now: float, *, step_timeout: float | None, reset_timeout: float | None
) -> tuple[list[Overdue], float | None]:
    """Find the members whose call takes longer than it may. Of a group it is one at most.

    Args:
        watches: of the groups, in their order.
        now: the time of ``time.monotonic``.
        step_timeout: seconds that a step may take; ``None`` for any time.
        reset_timeout: seconds that a reset, the making or the closing of an environment may take; ``None`` for any.

    Returns:
        What is overdue, and after how many seconds something else may be, so that it is worth to look again;
        ``None`` if there are no timeouts.
    """
    limits = (None, reset_timeout, reset_timeout, step_timeout, reset_timeout)  # by phase
    timeouts = [timeout for timeout in (step_timeout, reset_timeout) if timeout is not None]
    if not timeouts:
        return [], None
    found = []
    soonest = min(timeouts)  # of calls that begin just now
    for group, watch in enumerate(watches):
        since = float(watch.since[0])
        phase, member = int(watch.phase[0]), int(watch.member[0])
        limit = limits[phase]
        if limit is None or watch.since[0] != since:  # another call has begun meanwhile
            continue
        left = since + limit - now
        if left <= 0:
            found.append(Overdue(group, member, Phase(phase), now - since))
        else:
            soonest = min(soonest, left)
    return found, soonest
