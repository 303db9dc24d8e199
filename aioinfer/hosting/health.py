"""How a server is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Health"]


@dataclass(frozen=True, slots=True)
class Health:
    """How a server is: ``alive`` is about what runs it, ``ready`` about whether requests are served.

    Attributes:
        alive: whether the process of the server runs; of a server in this process, its worker.
        ready: whether it serves requests.
        pid: of the process; ``None`` before the start.
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
