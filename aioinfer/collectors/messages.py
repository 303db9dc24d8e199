"""What a collector and the hosts of its environments say to each other. Everything here pickles.

A host is in the collector's own process, or in a worker's; it gets and sends the same messages in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aioinfer.collectors.fragments import FragmentLayout
from aioinfer.collectors.local_policy import PickledPolicy
from aioinfer.collectors.policy_layout import PolicyLayout
from aioinfer.collectors.spaces import EnvLayout, InfoKeys

__all__ = [
    "Begin",
    "Cancelled",
    "Failed",
    "Grants",
    "GroupMembers",
    "GroupSetup",
    "HostConfig",
    "Made",
    "Making",
    "MemberFailed",
    "MemberReady",
    "Parked",
    "Pause",
    "Progress",
    "Restart",
    "Resume",
    "Retire",
    "Stop",
    "ThreadLeft",
]


@dataclass(frozen=True)
class HostConfig:
    """What a host makes.

    Attributes:
        factories: by the number of the member that each of them makes.
        groups: into how many groups its environments are divided.
        info_keys: entries of the environments' infos that are kept.
    """

    factories: dict[int, Callable[[], Any]]
    groups: int
    info_keys: InfoKeys


class GroupMembers(NamedTuple):
    """The members of a group, and how many environments each of them has."""

    members: tuple[int, ...]
    sizes: tuple[int, ...]
    is_uneven: bool
    """Whether its environments make unequal numbers of steps in the same number of calls."""


class GroupSetup(NamedTuple):
    """What a group needs to begin."""

    number: int
    """In the control block."""
    envs: tuple[int, ...]
    """The numbers of its environments."""
    seeds: tuple[int, ...]
    """Of each environment's first episode."""


# -- to a host ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Step from now on.

    Attributes:
        groups: in the order of ``Made.groups``.
        policy: what requests and replies have.
        layout: of the ring.
        num_rows: of the ring.
        num_groups: of the control block.
        num_envs: of the collector.
        random_frames: how many steps each environment makes at random before the policy is asked.
        address: where the policy is served, for a host in another process.
        local: the policy, where groups run it themselves.
    """

    groups: Sequence[GroupSetup]
    policy: PolicyLayout
    layout: FragmentLayout
    num_rows: int
    num_groups: int
    num_envs: int
    random_frames: Sequence[int]
    address: str | None = None
    local: PickledPolicy | None = None


class Grants(NamedTuple):
    """Rows of the ring for the next fragments of environments."""

    pairs: list[tuple[int, int]]


class Restart(NamedTuple):
    """Make a member again, and begin with these seeds, one for each of its environments."""

    member: int
    seeds: tuple[int, ...]


class Retire(NamedTuple):
    """Go on without a member that has failed."""

    member: int


class Cancelled(NamedTuple):
    """A member has not returned in time: do without what it is doing."""

    member: int
    seconds: float | None
    """How long its call takes at least; ``None``: it is its factory that has not returned."""


class Pause(NamedTuple):
    """Stop between two steps, and send :class:`Parked` with the same number."""

    number: int


class Resume(NamedTuple):
    """Go on."""


class Stop(NamedTuple):
    """Close the environments and end."""


# -- from a host -------------------------------------------------------------------------------------------


class Making(NamedTuple):
    """The factory of a member is called now, or it has returned."""

    member: int
    under_way: bool = True


class Made(NamedTuple):
    """Every member is made, but for those that were retired meanwhile."""

    layout: EnvLayout | None
    groups: tuple[GroupMembers, ...]


class MemberFailed(NamedTuple):
    """A member raised, and is gone. What of its fragments was complete is in an earlier message."""

    member: int
    error: bytes
    """As ``aioinfer.ipc.pickling.dump_exception`` makes it."""


class ThreadLeft(NamedTuple):
    """A thread of this process was left behind in a member's call."""


class MemberReady(NamedTuple):
    """A member was made again, and has begun its first episode."""

    member: int


class Progress(NamedTuple):
    """What a group has done."""

    finished: list[tuple[int, int]]
    """Environments and the rows of fragments that are complete, or were cut: ``ring.lengths`` says which."""
    asking: list[int]
    """Environments that need a row soon."""
    episodes: list[tuple[int, float, int]]
    """Environments whose episode has ended, its return, and its number of steps."""
    step_seconds: list[tuple[int, float]]
    """Environments, and how long one step of theirs took."""


class Parked(NamedTuple):
    """All groups of the host have stopped between two steps."""

    number: int
    """Of the pause, as one that was given up may have its answer late."""


class Failed(NamedTuple):
    """The host can't go on, as the policy does not answer any more, for example."""

    error: bytes
