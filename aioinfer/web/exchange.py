"""Requests over HTTP that have come whole, and their responses: many at a time, by callbacks, without tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.interaction_type import caller_mode
from aioinfer.web.asgi import Headers
from aioinfer.web.backend import PendingReply
from aioinfer.web.failures import outcome_of
from aioinfer.web.front import Front
from aioinfer.web.http import InferEndpoint, failure_response, too_large
from aioinfer.web.submission import Asked, Submission, submission_to

__all__ = ["Exchange", "Exchanges", "Respond"]

Respond: TypeAlias = Callable[[int, Sequence[tuple[bytes, bytes]], bytes], None]
"""Takes the status, the headers but for the length, and the body of a response."""

_Answer: TypeAlias = tuple[int, Sequence[tuple[bytes, bytes]], bytes]


class Exchange:
    """One request, and its response.

    Args:
        endpoint: reads and writes.
        respond: sends the response.
        received_at: when it had arrived, by ``time.perf_counter``.

    Attributes:
        size: bytes of the request, once they are counted.
        request: what the endpoint has read.
        pending: the request, if it is asked by itself.
        ended: whether it was answered, or cancelled.
    """

    __slots__ = ("ended", "endpoint", "pending", "received_at", "request", "respond", "size")

    def __init__(self, endpoint: InferEndpoint[Any], respond: Respond, received_at: float) -> None:
        self.endpoint = endpoint
        self.respond = respond
        self.received_at = received_at
        self.size = 0
        self.request: Any = None
        self.pending: PendingReply | None = None
        self.ended = False

    def done(self) -> bool:
        """Whether it has ended: then its request need not be computed. Any thread."""
        return self.ended


class Exchanges:
    """Serves requests that have come whole.

    Those that name neither a session nor a deadline are asked together at the end of a tick of the event loop, and
    answered together: to do one thing for many of them, one after the other, takes half of the time.

    Loop thread only.

    Args:
        front: what the protocols share.
        ended: called when one has ended.
    """

    def __init__(self, front: Front, ended: Callable[[], None]) -> None:
        self._front = front
        self._ended = ended
        self._submission: Submission | None = None
        self._asked: list[Asked] = []  # in this tick

    def serve(
        self, endpoint: InferEndpoint[Any], headers: Headers, body: bytes, caller: Caller, respond: Respond
    ) -> Exchange:
        """Serve a request.

        Args:
            endpoint: that it is for.
            headers: of the request; it has no ``Content-Encoding``.
            body: of the request.
            caller: who makes one after the other.
            respond: sends the response. It is called once, perhaps before this returns, and not after :meth:`cancel`.
        """
        front = self._front
        exchange = Exchange(endpoint, respond, time.perf_counter())
        size = len(body)
        try:
            if size > front.limits.max_message_size:
                raise too_large(front.limits.max_message_size)
            front.bytes_in_flight.add(size)
            exchange.size = size
            exchange.request = endpoint.decode(headers, body)
            entries = None if front.backend.deadline is not None else endpoint.plain_entries(exchange.request)
            if entries is None:
                exchange.pending = endpoint.submit(exchange.request, size, exchange.received_at)
                exchange.pending.future.add_done_callback(lambda _: self._answer_pending(exchange))
            else:
                self._ask(exchange, entries, caller)
        except Exception as error:
            front.count_refusal(endpoint.protocol, error)
            self._respond(exchange, self._failure(error))
        return exchange

    def refuse(self, respond: Respond, refusal: Exception) -> None:
        """Answer a request that may not be made."""
        respond(*failure_response(self._front.failure_of(refusal)))
        self._ended()

    def cancel(self, exchange: Exchange) -> None:
        """Its caller is gone: the request is not computed, if no batch has taken it."""
        if exchange.pending is not None:
            exchange.pending.cancel()
        elif not exchange.ended:
            self._front.end(exchange.endpoint.protocol, "cancelled", exchange.size, exchange.received_at)
        if self._end(exchange):
            self._ended()

    def _ask(self, exchange: Exchange, entries: Any, caller: Caller) -> None:
        payload = self._front.begin(entries)
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._ask_all)
        self._asked.append(Asked(payload, exchange, caller_mode(), False, caller))

    def _ask_all(self) -> None:
        asked, self._asked = self._asked, []
        if self._submission is None:
            self._submission = submission_to(self._front.backend, self._settle)
        self._submission.submit(asked)

    def _settle(self, exchanges: Sequence[Exchange], outcomes: Sequence[TensorDictBase | Exception]) -> None:
        answers: list[tuple[Exchange, _Answer]] = []
        for exchange, outcome in zip(exchanges, outcomes, strict=True):
            if exchange.ended:
                continue
            how = outcome_of(outcome) if isinstance(outcome, Exception) else "ok"
            self._front.end(exchange.endpoint.protocol, how, exchange.size, exchange.received_at)
            answers.append((exchange, self._answer_of(exchange, outcome)))
        for exchange, answer in answers:  # together: each caller that sleeps takes time to wake
            self._respond(exchange, answer)

    def _answer_pending(self, exchange: Exchange) -> None:
        assert exchange.pending is not None
        if exchange.ended:
            return
        try:
            outcome: TensorDictBase | Exception = exchange.pending.result()
        except Exception as error:
            outcome = error
        self._respond(exchange, self._answer_of(exchange, outcome))

    def _answer_of(self, exchange: Exchange, outcome: TensorDictBase | Exception) -> _Answer:
        if isinstance(outcome, Exception):
            return self._failure(outcome)
        try:
            body, headers = exchange.endpoint.encode(exchange.request, outcome)
        except Exception as error:
            return self._failure(error)
        return 200, headers, body

    def _failure(self, error: Exception) -> _Answer:
        return failure_response(self._front.failure_of(error))

    def _respond(self, exchange: Exchange, answer: _Answer) -> None:
        if self._end(exchange):
            exchange.respond(*answer)
            self._ended()

    def _end(self, exchange: Exchange) -> bool:
        """End an exchange; whether it has not ended before."""
        if exchange.ended:
            return False
        exchange.ended = True
        self._front.bytes_in_flight.remove(exchange.size)
        return True
