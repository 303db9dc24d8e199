"""Sessions: what one caller asks in order, whose requests are seeded, started anew and superseded together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aioinfer.errors import SupersededError
from aioinfer.web.backend import PendingReply

__all__ = ["SESSION_KEYS", "Session", "Sessions"]

SESSION_KEYS = frozenset({"is_init", "seed"})
"""Entries that a session adds to requests, where the policy reads them."""


class Session:
    """One connection of a robot, or what is asked with one ``session_id``.

    Its first request, and the first one after a reset, carries ``is_init`` true, if the policy reads that. Where that
    request gets no reply, the next one does so.

    Loop thread only.
    """

    __slots__ = ("_first", "_pending", "_seed", "_starts")

    def __init__(self) -> None:
        self._pending: dict[PendingReply, None] = {}  # without a reply, the oldest first
        self._first: PendingReply | None = None  # the pending one that says that the session starts
        self._starts = True
        self._seed: int | None = None

    def reset(self, seed: int | None = None) -> None:
        """Start anew with the next request.

        Args:
            seed: of the requests from now on; ``None``: they have none, or say it themselves.
        """
        self._starts = True
        self._first = None
        self._seed = seed

    def replaceable(self) -> Sequence[PendingReply]:
        """The requests that a newer one replaces: those that no batch has taken.

        Where that is not known, the oldest may be in a batch, and stays: else a caller that asks faster than the policy
        computes would never get a reply.
        """
        oldest = next(iter(self._pending), None)
        found = []
        for pending in self._pending:
            waits = pending.waits()
            if waits or (waits is None and pending is not oldest):
                found.append(pending)
        return found

    def defaults(self, replaced: Sequence[PendingReply] = ()) -> Mapping[str, Any]:
        """What the session adds to its next request: ``is_init [1]``, and ``seed [1]`` if it has one.

        Args:
            replaced: by that request.
        """
        starts = self._starts or self._first in replaced
        entries = {"is_init": np.array([starts])}
        if self._seed is not None:
            entries["seed"] = np.array([self._seed])
        return entries

    def add(self, pending: PendingReply, replaced: Sequence[PendingReply] = ()) -> None:
        """Note a request, and end those that it replaces."""
        if self._starts or self._first in replaced:
            self._starts = False
            self._first = pending
        self._pending[pending] = None
        for older in replaced:
            older.withdraw(SupersededError("a newer request of this session came before the reply"))

    def remove(self, pending: PendingReply, *, answered: bool) -> None:
        """Note that a request has ended, and whether with a reply."""
        self._pending.pop(pending, None)
        if pending is self._first:
            self._first = None
            self._starts = not answered


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
        """End a session, if there is one of this name."""
        self._sessions.pop(session_id, None)
