"""The transports inside one process: callers share the server's memory."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.batching import Caller
from aioinfer.client import CLOSED, AsyncInferenceClient, InferenceClient
from aioinfer.entries import RequestLike, make_request
from aioinfer.errors import ClientBusyError, ClientClosedError, NoFreeSlotError
from aioinfer.futures import Future
from aioinfer.modes import long_lived
from aioinfer.tensors import layout
from aioinfer.transports.base import Transport
from aioinfer.transports.polling import InferenceTransport
from aioinfer.transports.queue import REFUSALS, RefusableAsyncClient, RequestQueue, seconds_left
from aioinfer.transports.replies import (
    FutureReplySink,
    LockWaker,
    LoopReplySink,
    Receiver,
    ThreadReplySink,
    TransportSink,
    Waiter,
    make_waker,
    unwrap,
)

__all__ = ["SlotTransport", "ThreadingTransport"]


class _LocalTransport(Transport, InferenceTransport):
    """What both have in common: a sink for threads, one for futures, and one for each event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.future_sink = FutureReplySink(self)
        self.thread_sink = ThreadReplySink(self)
        self._loop_sinks: weakref.WeakValueDictionary[int, LoopReplySink] = weakref.WeakValueDictionary()

    def attach(self, queue: RequestQueue) -> None:
        queue.thread_sinks.append(self.thread_sink)
        super().attach(queue)

    def put(self, td: Any, waiter: Waiter) -> None:
        """Queue the request of a thread that will wait; raise what refuses it."""
        self.queue.put(td, waiter, self.thread_sink, self.thread_sink.caller())

    def loop_sink(self) -> LoopReplySink:
        """The one sink of the running event loop; it lives while a client or a request uses it."""
        loop = asyncio.get_running_loop()
        sink = self._loop_sinks.get(id(loop))  # which no other thread asks for
        if sink is None:
            sink = self._loop_sinks[id(loop)] = LoopReplySink(loop, self)
        return sink


class _LocalClient(InferenceClient):
    def __reduce__(self) -> NoReturn:
        raise _does_not_pickle()


class _LocalAsyncClient(RefusableAsyncClient):
    def is_pending(self, future: asyncio.Future[TensorDictBase]) -> bool | None:
        return self._transport.queue.holds(future)

    def withdraw(self, future: asyncio.Future[TensorDictBase]) -> bool:
        return self._transport.queue.withdraw(future) and future.cancel()

    @property
    def least_seconds(self) -> float:
        return min(tuple(self._transport.queue.pass_seconds), default=0.0)

    def __reduce__(self) -> NoReturn:
        raise _does_not_pickle()


def _does_not_pickle() -> TypeError:
    return TypeError(
        "a client of a ThreadingTransport or a SlotTransport is for the process in which it was made; give the server "
        "an MPTransport or a ProcessSlotTransport, and hand clients of that to other processes"
    )


class ThreadingTransport(_LocalTransport):
    """Callers of this process: any number of threads, and of tasks on any event loops, all at once.

    The right choice unless a reason speaks for another. Clients are cheap, and may be shared.
    """

    def submit(self, td: Any) -> Future[TensorDictBase]:
        future: Future[TensorDictBase] = Future()
        try:
            self.queue.put(td, future, self.future_sink)
            self.queue.notify()
        except REFUSALS as error:
            future.set_exception(error.with_traceback(None))
        except BaseException:
            future.cancel()
            raise
        return future

    def client(self, *, copy: bool = True) -> InferenceClient:
        return _ThreadClient(self)

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        return _TaskClient(self)


class _ThreadClient(_LocalClient):
    def __init__(self, transport: ThreadingTransport) -> None:
        self._transport = transport

    def close(self) -> None:
        self._transport = CLOSED

    def submit(self, td: RequestLike | None = None, **entries: Any) -> Future[TensorDictBase]:
        if td is None:
            td = entries
        elif entries or type(td) is not TensorDict:
            td = make_request(td, entries)
        return self._transport.submit(td)

    def __call__(
        self, td: RequestLike | None = None, timeout: float | None = None, *, wait: bool = False, **entries: Any
    ) -> TensorDictBase:
        if td is None:
            td = entries
        elif entries or type(td) is not TensorDict:
            td = make_request(td, entries)
        transport = self._transport
        sink = transport.thread_sink
        waiter = Waiter(sink, LockWaker())
        try:
            if wait:
                deadline = None if timeout is None else time.monotonic() + timeout
                transport.put_when_not_full(td, partial(transport.put, td, waiter), deadline)
                timeout = seconds_left(deadline)
            else:
                transport.queue.put(td, waiter, sink, sink.caller())
            transport.queue.notify()
            outcome = waiter.wait(timeout)
        except BaseException:
            waiter.abandon()
            raise
        try:
            return unwrap(*outcome)
        finally:
            del outcome  # the traceback of an error leads here: it must not lead back


class _TaskClient(_LocalAsyncClient):
    _transport: ThreadingTransport

    def __init__(self, transport: ThreadingTransport) -> None:
        self._transport = transport
        self._sink: LoopReplySink | None = None  # that of the loop which used this client last
        self._task: Callable[[], object] = _no_task  # a weak reference to the task which did so
        self._caller: Caller | None = None  # that this task is

    def close(self) -> None:
        self._transport = CLOSED

    def _put(self, td: Any) -> asyncio.Future[TensorDictBase]:
        sink = self._sink
        task = None if sink is None else sink.running_task()
        if sink is None or (task is None and not sink.runs_here()):
            sink = self._sink = self._transport.loop_sink()
            task = sink.running_task()
        if task is None:
            caller = None
        elif task is self._task():
            caller = self._caller
        else:
            caller = self._caller = sink.caller(task)
            self._task = weakref.ref(task)
        future: asyncio.Future[TensorDictBase] = asyncio.Future(loop=sink.loop)  # in half the time of create_future
        self._transport.queue.put(td, future, sink, caller)
        sink.notify_at_end_of_tick()
        return future


def _no_task() -> None:
    return None


class SlotTransport(_LocalTransport):
    """One fixed slot for each client, which has at most one request under way.

    A slot keeps its wake-up from request to request: for a blocking client an ``eventfd`` (a lock
    where there is none), for an awaitable one the client's event loop. The number of clients tells the
    server how many requests can be pending at all, so that a partial batch leaves as soon as every
    client waits, without ``timeout``.

    Args:
        num_slots: how many clients there can be, of both kinds together.
        preallocate: lay out one contiguous buffer ``[num_slots, ...]`` like the first request, and copy
            requests of that layout into it: a caller may then write to its request at once after
            ``submit``. Requests of another layout, and those with a dimension of rows, are taken as they are.

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
        self._index = index
        self._lock = threading.RLock()
        self._closed = False
        self.holder: _Call | Future[Any] | asyncio.Future[Any] | None = None
        """The call that has the slot, until it is done, or sets this to ``None``."""
        self._reply_to: tuple[TransportSink, Receiver] | None = None
        self._caller = Caller()

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
            self.holder, self._reply_to = holder, None

    def put(self, td: Any, receiver: Receiver, sink: TransportSink) -> None:
        """Queue the request of the call that has the slot.

        If this raises, the request may be in the queue all the same, and the caller ends the holder and the receiver.
        """
        self._reply_to = sink, receiver
        if self._closed:
            raise ClientClosedError("the client was closed; make another one")
        buffer = self.transport._buffer
        if buffer is not None and not (admission := self.transport.queue.admission).check(td):
            td = buffer.write(self._index, admission.make_td(td) if type(td) is dict else td)
        self.transport.queue.put(td, receiver, sink, self._caller)

    def close(self) -> None:
        """Give the slot to the next client that is made; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            holder, reply_to = self.holder, self._reply_to
        if holder is not None and reply_to is not None:
            sink, receiver = reply_to
            if not receiver.done():
                sink.set_exceptions([receiver], [ClientClosedError("the client was closed before the reply came")])
        self.transport._free.append(self._index)


class _SlotClient(_LocalClient):
    has_slot = True

    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._waiter: Waiter | None = None

    def close(self) -> None:
        self._slot.close()

    def submit(self, td: RequestLike | None = None, **entries: Any) -> Future[TensorDictBase]:
        if td is None:
            td = entries
        elif entries or type(td) is not TensorDict:
            td = make_request(td, entries)
        future: Future[TensorDictBase] = Future()
        try:
            self._slot.take(future)
            self._slot.put(td, future, self._slot.transport.future_sink)
            self._slot.transport.queue.notify()
        except REFUSALS as error:
            future.set_exception(error.with_traceback(None))
        except BaseException:
            future.cancel()
            raise
        return future

    def __call__(
        self, td: RequestLike | None = None, timeout: float | None = None, *, wait: bool = False, **entries: Any
    ) -> TensorDictBase:
        if td is None:
            td = entries
        elif entries or type(td) is not TensorDict:
            td = make_request(td, entries)
        slot, call = self._slot, _Call()
        transport = slot.transport
        sink = transport.thread_sink
        waiter: Waiter | None = None
        try:
            slot.take(call)
            waiter = self._waiter or Waiter(sink, make_waker())
            if wait:
                put = partial(slot.put, td, waiter, sink)
                deadline = None if timeout is None else time.monotonic() + timeout
                transport.put_when_not_full(td, put, deadline)
                timeout = seconds_left(deadline)
            else:
                slot.put(td, waiter, sink)
            transport.queue.notify()
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


class _AsyncSlotClient(_LocalAsyncClient):
    has_slot = True

    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._transport = slot.transport
        self._sink: LoopReplySink | None = None

    def close(self) -> None:
        self._slot.close()

    def _put(self, td: Any) -> asyncio.Future[TensorDictBase]:
        slot, sink = self._slot, self._sink
        if sink is None or not sink.runs_here():
            sink = self._sink = slot.transport.loop_sink()
        future: asyncio.Future[TensorDictBase] = asyncio.Future(loop=sink.loop)
        try:
            slot.take(future)
            slot.put(td, future, sink)
            sink.notify_at_end_of_tick()
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
