"""The health of a server, in this process or in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Health"]


@dataclass(frozen=True, slots=True)
class Health:
    """The health of a server: ``alive`` is about its process or its model thread, ``ready`` about whether it serves.

    Attributes:
        alive: whether the process runs, for a server in a process of its own; otherwise whether the model thread runs.
        ready: whether it serves requests.
        pid: that of the process that serves; ``None`` before a server in a process of its own has started.
        policy_version: the version of the weights in use; ``None`` if the process did not answer.
        pending: requests that wait now; ``None`` if the process did not answer.
        exit_code: that of a process that has ended; a negative one is the signal that killed it; ``None`` if unknown.
        reason: why it is not ready: it starts, it does not answer, its model thread died, it was killed, it is shut
            down. Empty if it is ready.
    """

    alive: bool
    ready: bool
    pid: int | None = None
    policy_version: int | None = None
    pending: int | None = None
    exit_code: int | None = None
    reason: str = ""
