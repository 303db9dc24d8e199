"""Requests over HTTP that have come whole, and their responses: many at a time, by callbacks, without tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.web.asgi import Headers
from aioinfer.web.backend import PendingReply
from aioinfer.web.front import Front
from aioinfer.web.http import InferEndpoint, failure_response, too_large
from aioinfer.web.plain_requests import PlainRequest, PlainRequests

__all__ = ["Exchange", "Exchanges", "Respond"]

Respond: TypeAlias = Callable[[int, Sequence[tuple[bytes, bytes]], bytes], None]
"""Takes the status, the headers but for the length, and the body of a response."""


class Exchange(PlainRequest):
    """One request, and its response.

    Args:
        endpoint: reads and writes.
        respond: sends the response.
        exchanges: that it is one of.

    Attributes:
        request: what the endpoint has read.
        pending: the request, if it is asked by itself.
        response: once there is one.
        is_open: whether it was neither answered nor cancelled.
    """

    __slots__ = ("_exchanges", "endpoint", "is_open", "pending", "request", "respond", "response")

    def __init__(self, endpoint: InferEndpoint[Any], respond: Respond, exchanges: Exchanges) -> None:
        super().__init__(time.perf_counter())
        self._exchanges = exchanges
        self.endpoint = endpoint
        self.respond = respond
        self.request: Any = None
        self.pending: PendingReply | None = None
        self.response: tuple[int, Sequence[tuple[bytes, bytes]], bytes] | None = None
        self.is_open = True

    @property
    def protocol(self) -> str:
        return self.endpoint.protocol

    def prepare(self, outcome: TensorDictBase | Exception) -> None:
        self._exchanges.prepare(self, outcome)

    def answer(self) -> None:
        self._exchanges.answer(self)


class Exchanges:
    """Serves requests that have come whole.

    Loop thread only.

    Args:
        front: what the protocols share.
        plain_requests: asks those that name neither a session nor a deadline.
        ended: called when one has ended.
    """

    def __init__(self, front: Front, plain_requests: PlainRequests, ended: Callable[[], None]) -> None:
        self._front = front
        self._plain_requests = plain_requests
        self._ended = ended

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
        exchange = Exchange(endpoint, respond, self)
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
                self._plain_requests.ask(exchange, entries, caller)
        except Exception as error:
            front.count_refusal(endpoint.protocol, error)
            self.prepare(exchange, error)
            self.answer(exchange)
        return exchange

    def refuse(self, respond: Respond, refusal: Exception) -> None:
        """Answer a request that may not be made."""
        respond(*failure_response(self._front.failure_of(refusal)))
        self._ended()

    def cancel(self, exchange: Exchange) -> None:
        """Its caller is gone: the request is not computed, if no batch has taken it."""
        if not self._close(exchange):
            return
        if exchange.pending is None:
            self._plain_requests.cancel(exchange)
        else:
            exchange.pending.cancel()

    def prepare(self, exchange: Exchange, outcome: TensorDictBase | Exception) -> None:
        """Make the response."""
        if not isinstance(outcome, Exception):
            try:
                body, headers = exchange.endpoint.encode(exchange.request, outcome)
            except Exception as error:
                outcome = error
            else:
                exchange.response = 200, headers, body
                return
        exchange.response = failure_response(self._front.failure_of(outcome))

    def answer(self, exchange: Exchange) -> None:
        """Send the response."""
        assert exchange.response is not None
        if self._close(exchange):
            exchange.respond(*exchange.response)

    def _answer_pending(self, exchange: Exchange) -> None:
        assert exchange.pending is not None
        if exchange.is_open:
            self.prepare(exchange, exchange.pending.outcome())
            self.answer(exchange)

    def _close(self, exchange: Exchange) -> bool:
        """Count an exchange no more; return whether it was open."""
        if not exchange.is_open:
            return False
        exchange.is_open = False
        self._front.bytes_in_flight.remove(exchange.size)
        self._ended()
        return True
