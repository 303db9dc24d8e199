"""How a server serves a transport that has only the five verbs: it looks for requests at short intervals."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import ServerClosedError, clone_exception
from aioinfer.interaction_type import detach_mode
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import InferenceTransport, ServedTransport
from aioinfer.transports.requests import Request

__all__ = ["PolledTransport"]

# A foreign `wait_for_work` can't be interrupted: the server looks up this often, in seconds, which
# costs an idle server less than 0.1 % of a core.
_LOOK_UP_INTERVAL = 0.3

_log = logging.getLogger("aioinfer")


class PolledTransport(ServedTransport):
    """Serves batches over the five verbs of a transport, and calls nothing else of it.

    What its ``wait_for_work`` and ``drain`` raise ends the server by name; what its ``resolve`` and
    ``resolve_exception`` raise costs that request its answer, and nobody else.

    Model thread only: ``_held``.

    Args:
        transport: the five verbs.
    """

    def __init__(self, transport: InferenceTransport) -> None:
        self._transport = transport
        self._requests = transport._aioinfer_requests
        self._held: deque[Request] = deque()  # drained but not yet claimed: the five verbs can't look without taking

    def check_open(self, admission: Admission) -> None:
        self._requests.admission.check_hand_over(admission)

    def open(self, admission: Admission) -> None:
        self._requests.open(admission)

    def close(self, error: ServerClosedError) -> None:
        self._requests.close(error)

    def finish(self, error: ServerClosedError) -> None:
        self.close(error)
        try:
            while requests := self.take(1024):
                self.fail_batch(requests, [clone_exception(error) for _ in requests])
        except BaseException:
            _log.exception("%s could not hand out what is pending", type(self._transport).__qualname__)
        self._requests.fail_all(error)

    def wake(self) -> None:
        pass  # the five verbs have no way

    def pending(self) -> int:
        return self._requests.pending

    def wait_for_pending(self, at_least: int, enough: int, timeout: float | None) -> int:
        if len(self._held) < at_least:
            seconds = _LOOK_UP_INTERVAL if timeout is None else max(0.0, min(timeout, _LOOK_UP_INTERVAL))
            self._transport.wait_for_work(seconds)
            self._hold(at_least - len(self._held))
        return len(self._held)

    def waited(self) -> float:
        return time.perf_counter() - self._held[0].submitted_at if self._held else 0.0

    def take(self, max_items: int) -> list[Request]:
        if len(self._held) < max_items:
            self._hold(max_items - len(self._held))
        taken = [self._held.popleft() for _ in range(min(max_items, len(self._held)))]
        self._requests.claim(len(taken))
        return taken

    def _hold(self, max_items: int) -> None:
        inputs, callbacks = self._transport.drain(max_items)
        now = time.perf_counter()
        for td, callback in zip(inputs, callbacks, strict=True):
            try:
                td, mode = detach_mode(td)
            except BaseException as error:  # of what is no TensorDict, say
                self._fail(callback, clone_exception(error))
            else:
                self._held.append(Request(td, callback, None, now, mode))

    def resolve_batch(self, requests: Sequence[Request], replies: Sequence[TensorDictBase]) -> None:
        self._requests.settle(len(requests))
        for request, reply in zip(requests, replies, strict=True):
            try:
                self._transport.resolve(request.receiver, reply)
            except BaseException as error:
                self._fail(request.receiver, clone_exception(error))

    def fail_batch(self, requests: Sequence[Request], errors: Sequence[Exception]) -> None:
        self._requests.settle(len(requests))
        for request, error in zip(requests, errors, strict=True):
            self._fail(request.receiver, error)

    def _fail(self, callback: Any, error: Exception) -> None:
        try:
            self._transport.resolve_exception(callback, error)
        except BaseException:  # its caller cancelled it, most likely; in no case may it cost the others their replies
            _log.debug("%s could not fail a request", type(self._transport).__qualname__, exc_info=True)
