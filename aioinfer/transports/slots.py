"""Callers of this process with one fixed slot each: no lock and no future is made on the hot path."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.errors import ClientBusyError, ClientClosedError, NoFreeSlotError
from aioinfer.futures import Future
from aioinfer.modes import long_lived
from aioinfer.tensors import layout
from aioinfer.transports.admission import REFUSALS
from aioinfer.transports.in_process import InProcessAsyncClient, InProcessClient, InProcessTransport
from aioinfer.transports.outlets import FUTURES, LoopOutlet, Outlet, Receiver
from aioinfer.transports.room import seconds_left
from aioinfer.transports.sleepers import Waiter, unwrap
from aioinfer.wakers import make_waker

__all__ = ["SlotTransport"]


class SlotTransport(InProcessTransport):
    """One fixed slot for each client, which has at most one request under way.

    A slot keeps its wake-up from request to request: for a blocking client an ``eventfd`` (a lock
    where there is none), for an awaitable one the client's event loop. The number of clients tells the
    server how many requests can be pending at all, so that a partial batch leaves as soon as every
    client waits, without ``timeout``.

    Args:
        num_slots: how many clients there can be, of both kinds together.
        preallocate: lay out one contiguous buffer ``[num_slots, ...]`` like the first request, and copy
            requests of that layout into it: a caller may then write to its request at once after
            ``submit``. Requests of another layout are taken as they are.

    Raises:
        ValueError: ``num_slots`` is no integer of at least 1.
    """

    def __init__(self, num_slots: int, *, preallocate: bool = False) -> None:
        if not isinstance(num_slots, int) or isinstance(num_slots, bool) or num_slots < 1:
            raise ValueError(f"num_slots must be an integer of at least 1, got {num_slots!r}")
        super().__init__()
        self._num_slots = num_slots
        self._buffer = _RequestBuffer(num_slots) if preallocate else None
        self._free = list(reversed(range(num_slots)))  # each change of it is one step

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Not supported: a request needs a slot.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a SlotTransport takes requests through its clients only; make one with client()")

    def client(self, *, copy: bool = True) -> InferenceClient:
        """Make a blocking client in a slot of its own.

        Raises:
            NoFreeSlotError: all slots are taken.
        """
        return _SlotClient(self._take_slot())

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        """Make an awaitable client in a slot of its own.

        Raises:
            NoFreeSlotError: all slots are taken.
        """
        return _AsyncSlotClient(self._take_slot())

    def callers(self) -> int | None:
        return self._num_slots - len(self._free)

    def _take_slot(self) -> _Slot:
        try:
            return _Slot(self, self._free.pop())
        except IndexError:
            raise NoFreeSlotError(
                f"all {self._num_slots} slots are taken; close a client, or make a SlotTransport with more"
            ) from None


class _Call:
    """One blocking call, while it has a slot."""

    __slots__ = ()

    def done(self) -> bool:
        return False


class _Slot:
    """What both kinds of client share: the slot's place in the buffer, and at most one request under way.

    Any thread. ``_lock`` guards who has the slot.
    """

    def __init__(self, transport: SlotTransport, index: int) -> None:
        self.transport = transport
        self.queue = transport._queue
        self._index = index
        self._lock = threading.RLock()
        self._closed = False
        self.holder: _Call | Future[Any] | asyncio.Future[Any] | None = None
        """Who has the slot, until it is done, or sets this to ``None``."""
        self._way_back: tuple[Outlet, Receiver] | None = None

    def take(self, holder: _Call | Future[Any] | asyncio.Future[Any]) -> None:
        """Have the slot, until ``holder`` is done or gives it back by setting the attribute to ``None``."""
        with self._lock:
            if self._closed:
                raise ClientClosedError("the client was closed; make another one")
            if self.holder is not None and not self.holder.done():
                raise ClientBusyError(
                    f"slot {self._index} has a request under way; "
                    "wait for its reply, cancel it, or make a client for each caller"
                )
            self.holder, self._way_back = holder, None

    def put(self, td: TensorDictBase, receiver: Receiver, outlet: Outlet) -> None:
        """Queue the request of whoever has the slot.

        Whatever is raised: the request may be in the queue, and whoever calls ends the holder and the receiver.
        """
        self._way_back = outlet, receiver
        if self._closed:
            raise ClientClosedError("the client was closed; make another one")
        buffer = self.transport._buffer
        if buffer is not None:
            self.queue.admission.check(td)
            td = buffer.write(self._index, td)
        self.queue.put(td, receiver, outlet)

    def close(self) -> None:
        """Give the slot to whoever asks for a client next; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            holder, way_back = self.holder, self._way_back
        if holder is not None and way_back is not None:
            outlet, receiver = way_back
            if not receiver.done():
                outlet.fail([receiver], [ClientClosedError("the client was closed before the reply came")])
        self.transport._free.append(self._index)


class _SlotClient(InProcessClient):
    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._waiter: Waiter | None = None

    def close(self) -> None:
        self._slot.close()

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        future: Future[TensorDictBase] = Future()
        try:
            self._slot.take(future)
            self._slot.put(td, future, FUTURES)
            self._slot.queue.ring()
        except REFUSALS as error:
            future.set_exception(error.with_traceback(None))
        except BaseException:
            future.cancel()
            raise
        return future

    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        slot, call = self._slot, _Call()
        waiter: Waiter | None = None
        try:
            slot.take(call)
            waiter = self._waiter or Waiter(slot.queue.sleepers, make_waker())
            if wait:
                put = partial(slot.put, td, waiter, slot.queue.sleepers)
                deadline = None if timeout is None else time.monotonic() + timeout
                slot.queue.room.put(put, deadline)
                timeout = seconds_left(deadline)
            else:
                slot.put(td, waiter, slot.queue.sleepers)
            slot.queue.ring()
            outcome = waiter.wait(timeout)
            self._waiter = waiter
        except BaseException:
            if slot.holder is call:
                self._waiter = None  # what still comes for the old one is thrown away
                if waiter is not None:
                    waiter.abandon()
            raise
        finally:  # no call is made here, which a signal handler could keep from happening
            if slot.holder is call:
                slot.holder = None
        try:
            return unwrap(*outcome)
        finally:
            del outcome  # the traceback of an error leads here: it must not lead back


class _AsyncSlotClient(InProcessAsyncClient):
    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._queue = slot.queue
        self._outlet: LoopOutlet | None = None

    def close(self) -> None:
        self._slot.close()

    def _put(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        slot, outlet = self._slot, self._outlet
        if outlet is None or not outlet.runs_here():
            outlet = self._outlet = slot.transport._outlet()
        future: asyncio.Future[TensorDictBase] = outlet.loop.create_future()
        try:
            slot.take(future)
            slot.put(td, future, outlet)
            outlet.ring_at_end_of_tick()
        except BaseException:
            future.cancel()
            raise
        return future


class _RequestBuffer:
    """A contiguous ``[num_slots, ...]`` buffer laid out like the first request.

    Each row has one writer, its slot's client. The model thread reads a row between the claim of its
    request and the reply; where a client withdrew that request and writes the next one meanwhile, what the
    model makes of the old one is thrown away.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._lock = threading.RLock()
        self._rows: Sequence[TensorDictBase] = ()
        self._layout: Any = None

    def write(self, index: int, td: TensorDictBase) -> TensorDictBase:
        """Copy a request into its row and return the row; return ``td`` itself if its layout is another."""
        found = layout(td)
        with torch.no_grad():
            if self._layout is None:
                with self._lock:
                    if self._layout is None:
                        with long_lived():
                            self._rows = td.expand(self._num_slots, *td.batch_size).clone().unbind(0)
                        self._layout = found
            if found != self._layout:
                return td
            return self._rows[index].update_(td)
