"""How a server is: in this process, or in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Health"]


@dataclass(frozen=True, slots=True)
class Health:
    """How a server is: ``alive`` is about its process or its worker, ``ready`` about whether it serves.

    Attributes:
        alive: whether the process runs, of a server in a process of its own; else whether the worker runs.
        ready: whether it serves requests.
        pid: of the process that serves; ``None`` before the start of one of its own.
        policy_version: of the weights in use; ``None`` if the process did not say.
        pending: requests that wait now; ``None`` if the process did not say.
        exit_code: of a process that has ended; negative, the signal that killed it; ``None`` if it is not known.
        reason: why it is not ready: it starts, it does not answer, its worker died, it was killed, it is shut down.
            Empty if it is ready.
    """

    alive: bool
    ready: bool
    pid: int | None = None
    policy_version: int | None = None
    pending: int | None = None
    exit_code: int | None = None
    reason: str = ""
