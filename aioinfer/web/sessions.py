"""Sessions: what one caller asks in order, whose requests are seeded, started anew and superseded together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np

from aioinfer.errors import SupersededError
from aioinfer.web.backend import PendingReply

__all__ = ["Session", "Sessions"]


class Session:
    """One connection of a robot, or what is asked with one ``session_id``.

    Loop thread only.

    Attributes:
        pending: its requests without a reply, the oldest first.
        seed: of its requests, where the policy reads one; ``None``: they say it, or there is none.
        starts: whether its next request is the first since it began, or was reset.
    """

    __slots__ = ("pending", "seed", "starts")

    def __init__(self) -> None:
        self.pending: dict[PendingReply, None] = {}
        self.seed: int | None = None
        self.starts = True

    def reset(self, seed: int | None = None) -> None:
        """Start anew: the next request is the first one."""
        self.starts = True
        self.seed = seed

    def complete(self, entries: dict[str, Any], in_keys: Collection[str]) -> None:
        """Add what the policy reads and the caller does not say: ``is_init``, and ``seed``, both ``[1]``."""
        if "is_init" in in_keys and "is_init" not in entries:
            entries["is_init"] = np.array([self.starts])
        if self.seed is not None and "seed" in in_keys and "seed" not in entries:
            entries["seed"] = np.array([self.seed])
        self.starts = False

    def supersede(self) -> None:
        """End the requests that have no reply yet: there is a newer one."""
        for pending in list(self.pending):
            pending.withdraw(SupersededError("a newer request of this session came before the reply"))

    def cancel(self) -> None:
        """End the requests that have no reply yet: their caller is gone."""
        for pending in list(self.pending):
            pending.cancel()


class Sessions:
    """The sessions that requests name, of which the least recently used is forgotten where there are too many.

    Args:
        limit: how many there may be.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, session_id: str) -> Session:
        """The session of this name, which begins if there is none."""
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = Session()
            if len(self._sessions) > self._limit:
                self._sessions.popitem(last=False)
        else:
            self._sessions.move_to_end(session_id)
        return session

    def forget(self, session_id: str) -> None:
        """End a session."""
        self._sessions.pop(session_id, None)
