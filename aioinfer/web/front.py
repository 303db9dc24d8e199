"""What the protocols of the app share: one way to ask, with the limits, the sessions and the counts of all of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import ServerClosedError
from aioinfer.web.access import Access
from aioinfer.web.backend import Backend, PendingReply
from aioinfer.web.failures import Failure, failure_of, outcome_of
from aioinfer.web.front_stats import FrontStats
from aioinfer.web.limits import BytesInFlight, Limits
from aioinfer.web.sessions import SESSION_KEYS, Session, Sessions

__all__ = ["Front"]


class Front:
    """One policy, as callers over the network see it.

    Loop thread only.

    Args:
        backend: answers.
        access: who may ask.
        limits: of what callers may take.
        name: of the policy.
        metadata: what robots are told first.
        newest_wins: whether a request of a session takes the place of those before it that have no reply yet.
        debug: whether errors that callers get have tracebacks.

    Attributes:
        stats: what was asked, and how it ended.
        sessions: those that requests name.
        bytes_in_flight: of messages without a reply.
        draining: why there will be no more replies soon; empty as long as all is well.
    """

    def __init__(
        self,
        backend: Backend,
        access: Access,
        limits: Limits,
        *,
        name: str,
        metadata: Mapping[str, Any],
        newest_wins: bool,
        debug: bool,
    ) -> None:
        self.backend = backend
        self.access = access
        self.limits = limits
        self.name = name
        self.metadata = metadata
        self.newest_wins = newest_wins
        self.debug = debug
        self.stats = FrontStats()
        self.sessions = Sessions(limits.max_sessions)
        self.bytes_in_flight = BytesInFlight(limits.max_bytes_in_flight)
        self.draining = ""
        self._reads_session = not SESSION_KEYS.isdisjoint(self.in_keys)

    def submit(
        self,
        entries: Mapping[str, Any],
        *,
        protocol: str,
        size: int,
        received_at: float,
        deadline: float | None = None,
        session: Session | None = None,
    ) -> PendingReply:
        """Ask; returns at once. The request is counted when it ends.

        Args:
            entries: of one row, or of ``n`` rows where the server has a ``request_spec``; or a TensorDict.
            protocol: whose caller asks.
            size: bytes of the message, for the statistics.
            received_at: when it had arrived, by ``time.perf_counter``.
            deadline: seconds from then on; ``None`` takes that of the app.
            session: whose request it is.

        Raises:
            InvalidRequestError: the entries make no request.
            ServerClosedError: the app is drained.
            DeadlineExceededError: the deadline has passed.
            NoFreeSlotError: all slots of the server are taken.
        """
        self._check_open()
        if session is None:
            pending = self.backend.submit(entries, received_at, deadline=deadline)
        else:
            replaced = session.replaceable() if self.newest_wins else ()
            defaults = session.defaults(replaced) if self._reads_session else None
            pending = self.backend.submit(entries, received_at, deadline=deadline, defaults=defaults)
            session.add(pending, () if pending.future.done() else replaced)  # unless the server refuses it
        self.stats.inflight += 1
        pending.future.add_done_callback(partial(self._done, pending, protocol, size, session))
        return pending

    @property
    def keeps_sessions(self) -> bool:
        """Whether it matters which session a request is of."""
        return self.newest_wins or self._reads_session

    def begin(self, entries: Mapping[str, Any]) -> TensorDictBase | dict[str, Any]:
        """Make a request that is asked in another way than by :meth:`submit`; :meth:`end` is to be called.

        Raises:
            InvalidRequestError: the entries make no request.
            ServerClosedError: the app is drained.
            ServerNotRunningError: the server was not started.
        """
        self._check_open()
        request = self.backend.make_request(entries)
        self.stats.inflight += 1
        return request

    def end(self, protocol: str, outcome: str, size: int, received_at: float) -> None:
        """Count a request that has ended; see :class:`FrontStats`."""
        self.stats.inflight -= 1
        self.stats.count(protocol, outcome, size, time.perf_counter() - received_at)

    def _check_open(self) -> None:
        if self.draining:
            raise ServerClosedError(self.draining)

    def _done(self, pending: PendingReply, protocol: str, size: int, session: Session | None, future: Any) -> None:
        self.backend.finish(pending)
        if future.cancelled():
            outcome = "cancelled" if pending.error is None else outcome_of(pending.error)
        else:
            outcome = outcome_of(future.exception())
        if session is not None:
            session.remove(pending, answered=outcome == "ok")
        self.end(protocol, outcome, size, pending.received_at)

    def count_refusal(self, protocol: str, error: BaseException) -> None:
        """Count a request that ended before it was asked."""
        self.stats.requests[protocol, outcome_of(error)] += 1

    def failure_of(self, error: BaseException) -> Failure:
        """What a caller is told of an error that its request ended with."""
        return failure_of(error, debug=self.debug)

    @property
    def in_keys(self) -> Collection[str]:
        """The entries that the policy reads, as far as it is known."""
        return self.backend.in_keys or ()
