"""Callers in other processes whose requests have a fixed layout: tensors lie in shared memory."""

from __future__ import annotations

import sys
import threading
import weakref
from array import array
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import InvalidRequestError, ModelError, NoFreeSlotError
from aioinfer.interaction_type import MODES
from aioinfer.ipc.sockets import NUMBER, FramedSocket, Listener
from aioinfer.rows import RowLayout
from aioinfer.transports.line import Board, Line, RemoteRequest
from aioinfer.transports.processes import ProcessTransport
from aioinfer.transports.queue import WRITTEN_IN_PLACE, RequestQueue
from aioinfer.transports.slot_memory import SlotMemory
from aioinfer.transports.slot_tickets import SlotTicket

__all__ = ["ProcessSlotTransport"]

_PLACE = (1 << 32) - 1
_WAYS_OUT = "close a client, or make a ProcessSlotTransport with more slots"


class ProcessSlotTransport(ProcessTransport):
    """Callers in other processes: the tensors of requests and replies lie in shared memory, only slot numbers travel.

    The fastest way between processes. A client is made here and handed to a worker, which may be forked or
    spawned, or is made in the worker by :func:`aioinfer.connect`. A worker holds one connected pair of Unix
    sockets, for all clients that it was handed together; what they ask in one tick of an event loop leaves with one
    system call. There is no lock, semaphore or thread between the processes that a killed one could keep or
    stop: a dead process is an end-of-file, at once.

    A client has one request under way at most. When its process ends, however it does, its slot is free for another.

    The system calls order the memory, also on processors that don't do so themselves: a client writes its row
    before it sends the number of its slot, and the server reads the row after it has received the number. Kernel and
    processor order both against the socket's lock; so it is with the reply, on the way back.

    Args:
        request_spec: a TensorDict shaped as one request is, of plain tensors: nested, of any dtype, without elements or
            with a batch dimension, as you like. Its values don't matter. Other requests are refused at the client.
        response_spec: the same for the replies. The policy version is added to them whether it is declared or not.
        num_slots: how many clients there can be at a time.
        ctx: not needed: clients travel by any context. Accepted for those who know it from elsewhere.
        drop_undeclared: leave entries out that the specs don't have, instead of refusing what has them.
        address: where workers connect, a path in the file system; by default one is made up.

    Raises:
        TypeError: a spec is no TensorDict, or has entries that are not tensors.
        ValueError: ``num_slots`` is no integer of at least 1.
        OSError: somebody listens at ``address`` already.
    """

    def __init__(
        self,
        request_spec: TensorDictBase,
        response_spec: TensorDictBase,
        *,
        num_slots: int,
        ctx: BaseContext | None = None,
        drop_undeclared: bool = False,
        address: str | None = None,
    ) -> None:
        if not isinstance(num_slots, int) or isinstance(num_slots, bool) or num_slots < 1:
            raise ValueError(f"num_slots must be an integer of at least 1, got {num_slots!r}")
        self.num_slots = num_slots
        self._request = RowLayout(request_spec, "request", drop_undeclared=drop_undeclared)
        self._reply = RowLayout(response_spec, "response", drop_undeclared=drop_undeclared)
        self._free = list(reversed(range(num_slots)))
        self._leases: dict[bytes, list[int]] = {}  # by ticket, the slots of clients that no process has used yet
        self._reserved = 0  # how many these are
        super().__init__(address)

    def _listen(self, listener: Listener) -> None:
        self._memory = SlotMemory(self._request, self._reply, self.num_slots)
        self._lock = threading.Lock()  # guards the free slots and the leases
        self._looking = False  # for free slots; under the poller's lock
        super()._listen(listener)

    def _estate(self) -> dict[str, Any]:
        names = ("num_slots", "_request", "_reply", "_free", "_leases", "_reserved")
        return {name: self.__dict__[name] for name in names}

    # -- clients ---------------------------------------------------------------------------------------

    def _lease(self, count: int, copy: bool = True) -> SlotTicket:
        ticket = self._blank_ticket().renewed(count, copy=copy)
        if count > self.num_slots:
            raise NoFreeSlotError(f"there are {self.num_slots} slots, {count} were asked for; {_WAYS_OUT}")
        if not self._serves_elsewhere:  # else the server's process finds slots when the client is first used
            self._look_for_room(count)
            with self._lock:
                self._leases[ticket.id] = self._take_slots(count)
                self._reserved += count
            ticket.lessor = weakref.ref(self)
        return ticket

    def _blank_ticket(self) -> SlotTicket:
        return SlotTicket(self.address, 1, request=self._request, reply=self._reply, num_slots=self.num_slots)

    # -- slots -----------------------------------------------------------------------------------------

    def _take_slots(self, count: int) -> list[int]:
        """Under the lock."""
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{count!r} is no number of slots")
        if count > len(self._free):
            raise NoFreeSlotError(
                f"{len(self._free)} of {self.num_slots} slots are free, {count} were asked for; {_WAYS_OUT}"
            )
        return [self._free.pop() for _ in range(count)]

    def _look_for_room(self, count: int) -> None:
        """Where slots are lacking, look at processes that have ended, or closed a client, just now."""
        if count <= len(self._free):
            return
        with self._board.poller.lock:
            if self._looking:  # and has found a process that joins, which can't have another join before itself
                self._board.read_joined()
                return
            self._looking = True
            try:
                self._board.poller.poll()
                self._board.read_joined()  # to the end, which may come after more
            finally:
                self._looking = False
        self.queue.notify()  # the model thread does not hear of what was read here

    def _occupy(self, ticket: bytes, count: int) -> list[int]:
        with self._lock:
            leased = self._end_lease(ticket)
        if leased is not None:
            return leased
        self._look_for_room(count)
        with self._lock:
            return self._take_slots(count)

    def _end_lease(self, ticket: bytes) -> list[int] | None:
        """Under the lock."""
        leased = self._leases.pop(ticket, None)
        if leased is not None:
            self._reserved -= len(leased)
        return leased

    def _vacate(self, slots: Sequence[int]) -> None:
        with self._lock:
            self._free += slots

    def release(self, ticket: bytes) -> bool:
        """The clients of a ticket were closed unused; say whether this is the process that keeps account of that."""
        if self._serves_elsewhere:
            return False
        with self._lock:
            self._free += self._end_lease(ticket) or ()
        return True

    def callers(self) -> int | None:
        return self.num_slots - len(self._free) - self._reserved

    def attach(self, queue: RequestQueue) -> None:
        super().attach(queue)
        self._memory.leave_out(queue.admission.version_key)

    # -- the server's side -----------------------------------------------------------------------------

    def _make_line(self, wire: FramedSocket, board: Board) -> Line:
        return _SlotLine(wire, board, self)


class _SlotLine(Line):
    def __init__(self, wire: FramedSocket, board: Board, transport: ProcessSlotTransport) -> None:
        super().__init__(wire, board, transport)
        self._transport = transport
        self._memory = transport._memory
        self._times = self._memory.times
        self._slots: Sequence[int] = ()
        self._entries: list[_SlotRequest] = []  # by place, what was asked there last

    def join(self, ticket: bytes, count: int, layouts: str) -> tuple[Any, Sequence[int]]:
        if layouts != (ours := self._transport._blank_ticket().layouts()):
            raise InvalidRequestError(f"the server at this address has {ours}; the client was made for {layouts}")
        self._slots = self._transport._occupy(ticket, count)
        self._entries = [self._entry(slot) for slot in self._slots]
        return self._slots, [self._transport._control.segment.fd, self._memory.segment.fd]

    def release(self, ticket: bytes) -> None:
        if self.joined:
            raise ValueError("it has joined, and so uses its clients")
        self._transport.release(ticket)

    def describe(self) -> SlotTicket:
        return self._transport._blank_ticket()

    def _entry(self, slot: int) -> _SlotRequest:
        return _SlotRequest(self, slot, self._memory)

    def ask(self, words: Sequence[int]) -> None:
        if self.transport.queue.admission.spec is not None or not self.joined:
            super().ask(words)
        else:
            self.transport.queue.put_remote_all(self._note(words))

    def ask_one(self, text: int, payload: bytes | None, *, wait: bool) -> None:
        (entry,) = self._note([text])
        try:
            self.transport.queue.admission.check_spec(entry.td)
        except InvalidRequestError as error:
            self.set_exceptions([entry], [error])
        else:
            self.transport.queue.put_remote(entry, wait=wait)

    def _note(self, words: Sequence[int]) -> Sequence[_SlotRequest]:
        entries, times = self._entries, self._times
        asked: list[_SlotRequest] = []
        for text in words:
            entry = entries[text & _PLACE]
            if entry.under_way:  # its caller gave it up, or this one could not come
                entry.gone = True
                entry = entries[text & _PLACE] = self._entry(entry.slot)
            entry.number = text & NUMBER
            entry.mode = MODES[text >> 56 & 15]
            entry.submitted_at = times[entry.slot]
            entry.under_way = True
            entry.gone = False
            asked.append(entry)
        return asked

    def cancel(self, number: int) -> None:
        entry = self._entries[number & _PLACE]
        if entry.under_way and entry.number == number:
            entry.gone = True

    def leave(self) -> None:
        for entry in self._entries:
            entry.gone = True
        self._transport._vacate(self._slots)

    def set_results(self, receivers: Sequence[_SlotRequest], replies: Sequence[TensorDictBase]) -> None:
        if replies[0] is not WRITTEN_IN_PLACE:  # either all are or none
            receivers = [
                receiver for receiver, reply in zip(receivers, replies, strict=True) if self._put(receiver, reply)
            ]
        if len(receivers) == 1:
            data = receivers[0].number.to_bytes(8, sys.byteorder)
        else:
            data = array("Q", [receiver.number for receiver in receivers]).tobytes()
        for receiver in receivers:  # afterwards: another thread may use it again for the next request at once
            receiver.under_way = False
        self.send(data)

    def _put(self, receiver: _SlotRequest, reply: TensorDictBase) -> bool:
        try:
            self._memory.put_reply(receiver.slot, reply, self.transport.queue.admission.version_key)
        except ModelError as error:
            self.set_exceptions([receiver], [error])
            return False
        return True

    def discard(self, receiver: _SlotRequest) -> None:
        receiver.under_way = False


class _SlotRequest(RemoteRequest):
    """A request in a slot; used again and again, as long as the one before is over."""

    __slots__ = ("slot", "store", "under_way")

    def __init__(self, line: _SlotLine, slot: int, memory: SlotMemory) -> None:
        super().__init__(memory.requests.row(slot), line, 0, 0.0, None)
        self.slot = slot
        self.store = memory
        self.under_way = False
