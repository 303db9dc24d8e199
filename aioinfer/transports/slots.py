"""Callers of this process with one fixed slot each: no lock and no future is made on the hot path."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import torch
from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.tensors import layout
from aioinfer.transports.bells import cheapest_bell
from aioinfer.transports.in_process import InProcessTransport
from aioinfer.transports.outlets import FUTURES, LoopOutlet, Outlet, Receiver
from aioinfer.transports.sleepers import Waiter

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
        self._made_lock = threading.Lock()
        self._made = 0

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Not supported: a request needs a slot.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a SlotTransport takes requests through its clients only; make one with client()")

    def client(self) -> InferenceClient:
        """Make a blocking client in a slot of its own.

        Raises:
            RuntimeError: all slots are taken.
        """
        return _SlotClient(_Slot(self, self._next_index()))

    def async_client(self) -> AsyncInferenceClient:
        """Make an awaitable client in a slot of its own.

        Raises:
            RuntimeError: all slots are taken.
        """
        return _AsyncSlotClient(_Slot(self, self._next_index()))

    def callers(self) -> int | None:
        return self._made

    def _next_index(self) -> int:
        with self._made_lock:
            index = self._made
            if index == self._num_slots:
                raise RuntimeError(f"all {self._num_slots} slots are taken; make a SlotTransport with more")
            self._made += 1
            return index


class _Slot:
    """What both kinds of client share: the slot's place in the buffer, and at most one request under way."""

    def __init__(self, transport: SlotTransport, index: int) -> None:
        self.transport = transport
        self.queue = transport._queue
        self._index = index
        self._lock = threading.Lock()
        self._under_way: Receiver | None = None

    def put(self, td: TensorDictBase, receiver: Receiver, outlet: Outlet) -> None:
        with self._lock:
            if self._under_way is not None and not self._under_way.done():
                raise RuntimeError(
                    f"slot {self._index} has a request under way; "
                    "wait for its reply, cancel it, or make a client for each caller"
                )
            self._under_way = receiver
        try:
            buffer = self.transport._buffer
            if buffer is not None:
                self.queue.admission.check(td)
                td = buffer.write(self._index, td)
            self.queue.put(td, receiver, outlet)
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        self._under_way = None


class _SlotClient(InferenceClient):
    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._waiter = self._make_waiter()

    def _make_waiter(self) -> Waiter:
        return Waiter(self._slot.queue.sleepers, cheapest_bell())

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        future: Future[TensorDictBase] = Future()
        self._slot.put(td, future, FUTURES)
        self._slot.queue.ring()
        return future

    def _call(self, td: TensorDictBase, timeout: float | None) -> TensorDictBase:
        slot, waiter = self._slot, self._waiter
        slot.put(td, waiter, slot.queue.sleepers)
        try:
            slot.queue.ring()
            return waiter.wait(timeout)
        finally:
            if waiter.cancelled():  # what still comes for the old one is thrown away
                self._waiter = self._make_waiter()
            slot.free()

    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        return self._slot.queue.room.call(self._call, td, timeout) if wait else self._call(td, timeout)


class _AsyncSlotClient(AsyncInferenceClient):
    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._outlet: LoopOutlet | None = None

    def submit(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        slot, outlet = self._slot, self._outlet
        if outlet is None or not outlet.runs_here():
            outlet = self._outlet = slot.transport._outlet()
        future: asyncio.Future[TensorDictBase] = outlet.loop.create_future()
        slot.put(td, future, outlet)
        outlet.ring_at_end_of_tick()
        return future

    async def __call__(self, td: TensorDictBase, *, wait: bool = False) -> TensorDictBase:
        return await (self._slot.queue.room.async_call(self.submit, td) if wait else self.submit(td))


class _RequestBuffer:
    """A contiguous ``[num_slots, ...]`` buffer laid out like the first request.

    Each row has one writer, its slot's client. The model thread reads a row between the claim of its
    request and the reply; where a client withdrew that request and writes the next one meanwhile, what the
    model makes of the old one is thrown away.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._lock = threading.Lock()
        self._rows: tuple[TensorDictBase, ...] = ()
        self._layout: Any = None

    def write(self, index: int, td: TensorDictBase) -> TensorDictBase:
        """Copy a request into its row and return the row; return ``td`` itself if its layout is another."""
        found = layout(td)
        with torch.no_grad():
            if self._layout is None:
                with self._lock:
                    if self._layout is None:
                        self._rows = td.expand(self._num_slots, *td.batch_size).clone().unbind(0)
                        self._layout = found
            if found != self._layout:
                return td
            return self._rows[index].update_(td)
