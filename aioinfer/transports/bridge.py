"""Clients of a transport that has only ``submit(td) -> Future``: both kinds of caller, on any such future."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from tensordict import TensorDictBase

from aioinfer.client import CLOSED, InferenceClient
from aioinfer.errors import ServerClosedError, clone_exception
from aioinfer.futures import Future
from aioinfer.interaction_type import attach_mode, caller_mode
from aioinfer.transports.admission import REFUSALS, Admission
from aioinfer.transports.room import BoundedAsyncClient, RoomQueue, seconds_left

__all__ = ["BridgedAsyncClient", "BridgedClient", "OpenRequests"]

Submit = Callable[[TensorDictBase], "concurrent.futures.Future[TensorDictBase]"]

_log = logging.getLogger("aioinfer")


class OpenRequests:
    """Knows which requests have no answer yet, so that none is left behind when the server closes.

    Any thread. A request that slips into the transport while the server closes is failed either by
    ``fail_all``, which finds it here, or by ``submit``, which finds the server closed. ``_lock`` guards the count of
    requests on their way into the transport; the model thread never waits for it.
    """

    def __init__(self) -> None:
        self.admission = Admission()
        self.room = RoomQueue(self._full)
        self._futures: set[concurrent.futures.Future[TensorDictBase]] = set()
        self._closed: ServerClosedError | None = None
        self._lock = threading.RLock()
        self._submitting: set[object] = set()
        self._claimed: deque[None] = deque()  # an element for each; a count could not be changed in one step

    def open(self, admission: Admission) -> None:
        """Take requests under the terms of ``admission``, which must not be those of a second running server."""
        self.admission.hand_over(admission)
        self.admission = admission
        self._closed = None

    @property
    def pending(self) -> int:
        """How many requests wait; a request that its caller gave up in its forward pass counts for one less."""
        return max(0, len(self._futures) - len(self._claimed))

    def submit(self, submit: Submit, td: TensorDictBase) -> concurrent.futures.Future[TensorDictBase]:
        """Check a request, count it against ``max_pending``, and submit it; raise what refuses it."""
        self.admission.check(td)
        place = object()
        try:
            with self._lock:
                full = self._full()
                if not full:
                    self._submitting.add(place)
            if full:
                raise self.admission.overloaded()
            future = submit(attach_mode(td, caller_mode()))
            self._futures.add(future)
            self._submitting.discard(place)
        except BaseException:
            if place in self._submitting:
                self._submitting.discard(place)
                self.room.announce(1)
            raise
        future.add_done_callback(self._on_done)
        if self._closed is not None:
            _fail(future, self._closed)
        return future

    def _on_done(self, future: concurrent.futures.Future[TensorDictBase]) -> None:
        self._futures.discard(future)
        if future.cancelled():
            self.room.announce(1)

    def _full(self) -> bool:
        limit = self.admission.max_pending
        return limit is not None and self.pending + len(self._submitting) >= limit and self.admission.closed is None

    def claim(self, count: int) -> None:
        """The server took ``count`` requests to compute them."""
        self._claimed.extend([None] * count)
        self.room.announce(count)

    def settle(self, count: int) -> None:
        """The server answered ``count`` requests that it had taken."""
        for _ in range(min(count, len(self._claimed))):
            self._claimed.pop()

    def close(self, error: ServerClosedError) -> None:
        """Refuse what comes from now on."""
        self.admission.close(error)
        self.room.announce()

    def fail_all(self, error: ServerClosedError) -> None:
        """Fail every request that has no answer yet."""
        self._closed = error
        for future in tuple(self._futures):
            _fail(future, error)

    def closed_error(self) -> Exception | None:
        """The error for a caller whose future was cancelled because the server closed."""
        closed = self._closed
        return None if closed is None else clone_exception(closed)


def _fail(future: Any, error: ServerClosedError) -> None:
    """End a future; one that only behaves as a standard future can at least be cancelled."""
    try:
        if isinstance(future, concurrent.futures.Future):
            future.set_exception(clone_exception(error))
        else:
            future.cancel()
    except concurrent.futures.InvalidStateError:  # it was settled meanwhile
        pass
    except BaseException:  # of a callback, or of a foreign future: the others are to end all the same
        _log.exception("the future of a request could not be ended")


class BridgedClient(InferenceClient):
    """Blocks on the transport's future."""

    def __init__(self, submit: Submit, open_requests: OpenRequests) -> None:
        self._submit = submit
        self._open = open_requests

    def close(self) -> None:
        self._open = CLOSED

    def submit(self, td: TensorDictBase) -> concurrent.futures.Future[TensorDictBase]:
        try:
            return self._open.submit(self._submit, td)
        except REFUSALS as error:
            refused: Future[TensorDictBase] = Future()
            refused.set_exception(error.with_traceback(None))
            return refused

    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        requests, put = self._open, partial(self._open.submit, self._submit, td)
        deadline = None if timeout is None else time.monotonic() + timeout
        future = requests.room.put(put, deadline) if wait else put()
        try:
            return future.result(seconds_left(deadline))
        except concurrent.futures.CancelledError:
            raise requests.closed_error() or concurrent.futures.CancelledError from None
        except BaseException:
            future.cancel()  # nothing happens if it is the future that raised
            raise


class BridgedAsyncClient(BoundedAsyncClient):
    """Copies the transport's future into one of the running loop."""

    def __init__(self, submit: Submit, open_requests: OpenRequests) -> None:
        self._submit = submit
        self._open = open_requests

    def close(self) -> None:
        self._open = CLOSED

    def _put(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        loop, requests = asyncio.get_running_loop(), self._open
        there = requests.submit(self._submit, td)
        here: asyncio.Future[TensorDictBase] = loop.create_future()

        def settle() -> None:
            if here.done():
                return
            error = requests.closed_error() if there.cancelled() else there.exception()
            if error is None and there.cancelled():
                here.cancel()
            elif error is not None:
                here.set_exception(error)
            else:
                here.set_result(there.result())

        def on_done_there(_: object) -> None:
            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # the loop is closed, and its tasks with it
                pass

        def on_done_here(_: object) -> None:
            if here.cancelled():
                there.cancel()

        there.add_done_callback(on_done_there)
        here.add_done_callback(on_done_here)
        return here

    @property
    def _room(self) -> RoomQueue:
        return self._open.room
