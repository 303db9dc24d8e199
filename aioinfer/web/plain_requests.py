"""Requests that name neither a session nor a deadline: many are asked together, and answered together."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.interaction_type import caller_mode
from aioinfer.web.failures import outcome_of
from aioinfer.web.front import Front
from aioinfer.web.submission import Asked, Submission, submission_to

__all__ = ["PlainRequest", "PlainRequests"]

_log = logging.getLogger("aioinfer.web")


class PlainRequest(ABC):
    """A request that :class:`PlainRequests` may ask, and which takes its own outcome then.

    Args:
        received_at: when it had arrived, by ``time.perf_counter``.

    Attributes:
        size: bytes of its message, once they are counted.
        has_ended: whether it was asked so, and there is a reply or an error, or its caller is gone.
    """

    __slots__ = ("has_ended", "received_at", "size")

    def __init__(self, received_at: float) -> None:
        self.received_at = received_at
        self.size = 0
        self.has_ended = False

    def done(self) -> bool:
        """Whether it need not be computed any more. Any thread."""
        return self.has_ended

    @property
    @abstractmethod
    def protocol(self) -> str:
        """By which it is counted."""

    @abstractmethod
    def prepare(self, outcome: TensorDictBase | Exception) -> None:
        """Make the message that its caller gets."""

    @abstractmethod
    def answer(self) -> None:
        """Send that message."""


class PlainRequests:
    """Asks those of a tick of the event loop together, and answers those of a batch together.

    To do one thing for many of them, one after the other, takes half of the time that it takes to do all for each.

    Loop thread only.

    Args:
        front: what the protocols share.
    """

    def __init__(self, front: Front) -> None:
        self._front = front
        self._submission: Submission | None = None
        self._asked: list[Asked] = []  # in this tick

    def ask(self, request: PlainRequest, entries: Mapping[str, Any] | TensorDictBase, caller: Caller) -> None:
        """Ask at the end of this tick; the request gets the outcome, even if the server refuses it.

        Args:
            request: takes the outcome.
            entries: of one row, or of ``n`` rows where the server has a ``request_spec``.
            caller: who makes one after the other.

        Raises:
            InvalidRequestError: the entries make no request.
            ServerClosedError: the app is drained.
            ServerNotRunningError: the server was not started.
        """
        payload = self._front.begin(entries)
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._submit)
        self._asked.append(Asked(payload, request, caller_mode(), False, caller))

    def cancel(self, request: PlainRequest) -> None:
        """The caller of a request is gone: it is not computed, if no batch has taken it."""
        if not request.has_ended:
            self._end(request, "cancelled")
            if self._submission is not None:
                self._submission.cancel(request)

    def _submit(self) -> None:
        asked, self._asked = self._asked, []
        if self._submission is None:
            self._submission = submission_to(self._front.backend, self._settle)
        self._submission.submit([one for one in asked if not one.receiver.done()])

    def _settle(self, requests: Sequence[PlainRequest], outcomes: Sequence[TensorDictBase | Exception]) -> None:
        prepared: list[PlainRequest] = []
        for request, outcome in zip(requests, outcomes, strict=True):
            if not request.has_ended:
                self._end(request, outcome_of(outcome) if isinstance(outcome, Exception) else "ok")
                request.prepare(outcome)
                prepared.append(request)
        for request in prepared:  # together: each caller that sleeps takes time to wake
            try:
                request.answer()
            except Exception:  # the others get their replies all the same
                _log.exception("a reply could not be sent")

    def _end(self, request: PlainRequest, outcome: str) -> None:
        request.has_ended = True
        self._front.end(request.protocol, outcome, request.size, request.received_at)
