"""Callers in other processes whose requests have a fixed layout: their tensors lie in shared memory."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Iterable, Sequence, Set
from functools import lru_cache
from multiprocessing.context import BaseContext
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aioinfer.batching import Caller
from aioinfer.entries import Entries
from aioinfer.errors import InvalidRequestError, ModelError, NoFreeSlotError
from aioinfer.interaction_type import MODES
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.sockets import NUMBER, Listener
from aioinfer.modes import long_lived
from aioinfer.rows import RowBlock, RowLayout, Rows, RowTable, Value
from aioinfer.tensors import Allocate, VersionTensorCache, build
from aioinfer.transports.ipc.client import Endpoint
from aioinfer.transports.ipc.connection import ClientCodec, OutgoingRequest
from aioinfer.transports.ipc.protocol import CLIENT_INDEX, StatusPage
from aioinfer.transports.ipc.server import ProcessTransport, RemoteRequest, ServerCodec, ServerConnection
from aioinfer.transports.queue import RequestQueue
from aioinfer.transports.request import WRITTEN_IN_PLACE, PartReceiver, Request, RequestPart

__all__ = ["ProcessSlotTransport"]

_WAYS_OUT = "close a client, or make a ProcessSlotTransport with more slots"
# Of so many sets of slots the index is kept: to make one takes 3 to 5 us, and callers tend to come back together.
_KEPT_INDICES = 1024
# Up to so many rows: 8 KiB of each index.
_KEPT_ROWS = 1024
# Up to so many times or versions are written one by one.
_FEW = 16
# The bit of a request's header, above those of its mode, that says that it has a dimension of rows.
_BATCHED = 1 << 59

Span: TypeAlias = int | range
"""The rows of a request: the one of a request without a dimension of rows, or those that follow each other."""


class ProcessSlotTransport(ProcessTransport):
    """Callers in other processes: the tensors of requests and replies lie in shared memory, only slot numbers travel.

    The fastest way between processes. A client is made here and handed to a worker, which may be forked or
    spawned, or is made in the worker by :func:`aioinfer.connect`. A worker holds one connected pair of Unix
    sockets, for all clients that it was handed together; what they ask in one tick of an event loop leaves with one
    system call. There is no lock, semaphore or thread between the processes that a killed one could keep or
    stop: a dead process is an EOF, at once.

    A client has one request under way at most. When its process ends, however it does, its slot is free for another.

    A request is one row, of the batch size ``[*size]`` that ``request_spec`` has, and its reply is one of
    ``response_spec``; or it is up to ``rows`` rows ``[n, *size]``, and so is its reply. A request without rows
    gets an empty reply at once. Requests of one row and of many share a forward pass. Shared memory holds
    ``num_slots * rows`` rows of each spec, and 8 bytes for the version of each reply; what no request has
    touched takes no memory.

    The system calls order the memory, also on processors that don't do so themselves: a client writes its row
    before it sends the number of its slot, and the server reads the row after it has received the number. Kernel and
    processor order both against the socket's lock; so it is with the reply, on the way back.

    Args:
        request_spec: a TensorDict shaped as one request is, of plain tensors: nested, of any dtype, without elements or
            with a batch dimension, as you like. Its values don't matter. Other requests are refused at the client.
        response_spec: the same for the replies. The policy version is added to them whether it is declared or not.
        num_slots: how many clients there can be at a time.
        rows: how many rows a request may have at most.
        ctx: not needed: clients travel by any context. Accepted for those who know it from elsewhere.
        drop_undeclared: leave entries out that the specs don't have, instead of refusing what has them.
        address: where workers connect, a path in the file system; by default one is made up.

    Raises:
        TypeError: a spec is no TensorDict, or has entries that are not tensors.
        ValueError: ``num_slots`` or ``rows`` is no integer of at least 1.
        OSError: somebody listens at ``address`` already.
    """

    checked_by_clients = True
    can_release = True

    def __init__(
        self,
        request_spec: TensorDictBase,
        response_spec: TensorDictBase,
        *,
        num_slots: int,
        rows: int = 1,
        ctx: BaseContext | None = None,
        drop_undeclared: bool = False,
        address: str | None = None,
    ) -> None:
        for name, number in (("num_slots", num_slots), ("rows", rows)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
        self.num_slots = num_slots
        self._request = RowLayout(request_spec, "request", drop_undeclared=drop_undeclared, rows=rows)
        self._reply = RowLayout(response_spec, "response", drop_undeclared=drop_undeclared, rows=rows)
        self._free = list(reversed(range(num_slots)))
        self._reserved: dict[bytes, list[int]] = {}  # by endpoint, the slots of clients that no process has used yet
        self._num_reserved = 0
        super().__init__(address)

    def _listen(self, listener: Listener) -> None:
        self.table = SlotTable(self._request, self._reply, self.num_slots)
        self._lock = threading.Lock()  # guards which slots are free and reserved
        self._reaping = False  # under the selector's lock
        super()._listen(listener)

    def _handoff_state(self) -> dict[str, Any]:
        names = ("num_slots", "_request", "_reply", "_free", "_reserved", "_num_reserved")
        return {name: self.__dict__[name] for name in names}

    def client_codec(self) -> ClientCodec:
        return _SlotClientCodec(self._request, self._reply, self.num_slots)

    def new_codec(self, connection: ServerConnection) -> ServerCodec:
        return _SlotServerCodec(connection, self)

    def callers(self) -> int | None:
        return self.num_slots - len(self._free) - self._num_reserved

    def attach(self, queue: RequestQueue) -> None:
        super().attach(queue)
        self.table.leave_out(queue.admission.version_key)

    # -- slots -----------------------------------------------------------------------------------------

    def _reserve(self, endpoint: Endpoint) -> None:
        count = endpoint.count
        if count > self.num_slots:
            raise NoFreeSlotError(f"there are {self.num_slots} slots, {count} were asked for; {_WAYS_OUT}")
        if not self._serves_elsewhere:  # else the server's process finds slots when the client is first used
            self._reap_dead_clients(count)
            with self._lock:
                self._reserved[endpoint.id] = self._take(count)
                self._num_reserved += count
            endpoint.transport = weakref.ref(self)

    @property
    def request_layout(self) -> RowLayout:
        """Of each row of a request."""
        return self._request

    @property
    def free_slots(self) -> int:
        """How many slots no client has, in the process that serves.

        A slot of a process that has ended just now may still count as taken.
        """
        return len(self._free)

    def _take(self, count: int) -> list[int]:
        """Under the lock."""
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{count!r} is no number of slots")
        if count > len(self._free):
            raise NoFreeSlotError(
                f"{len(self._free)} of {self.num_slots} slots are free, {count} were asked for; {_WAYS_OUT}"
            )
        return [self._free.pop() for _ in range(count)]

    def _reap_dead_clients(self, count: int) -> None:
        """Where slots are lacking, look at processes that have ended, or closed a client, just now."""
        if count <= len(self._free):
            return
        connections = self.connections
        with connections.selector.lock:
            if self._reaping:  # and has found a process to accept, which can't have another accepted before itself
                connections.read_all(accepted_only=True)
                return
            self._reaping = True
            try:
                connections.selector.poll()
                connections.read_all(accepted_only=True)  # to the end, which may come after more
            finally:
                self._reaping = False
        self.queue.notify()  # the model thread does not hear of what was read here

    def acquire_slots(self, endpoint_id: bytes, count: int) -> list[int]:
        """Take the slots that are reserved for an endpoint, or free ones; raise :class:`NoFreeSlotError`."""
        with self._lock:
            reserved = self._end_reservation(endpoint_id)
        if reserved is not None:
            return reserved
        self._reap_dead_clients(count)
        with self._lock:
            return self._take(count)

    def _end_reservation(self, endpoint_id: bytes) -> list[int] | None:
        """Under the lock."""
        reserved = self._reserved.pop(endpoint_id, None)
        if reserved is not None:
            self._num_reserved -= len(reserved)
        return reserved

    def release_slots(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        with self._lock:
            self._free += slots

    def release(self, endpoint_id: bytes) -> bool:
        if self._serves_elsewhere:
            return False
        with self._lock:
            self._free += self._end_reservation(endpoint_id) or ()
        return True


def _index(slots: Sequence[int]) -> Tensor:
    index: Tensor = _kept_index(tuple(slots))[0]
    return index


def _rows_of(spans: Sequence[Span]) -> tuple[Rows, bool]:
    """The rows of requests, in order, and whether no request has a dimension for them."""
    if len(spans) == 1 and type(spans[0]) is range:
        return spans[0], False
    kept = _kept_index(tuple(spans))
    return (_make_index(spans), False) if kept[0] is None else kept


@lru_cache(_KEPT_INDICES)
def _kept_index(spans: tuple[Span, ...]) -> tuple[Any, bool]:
    """The numbers of rows as a tensor, which is read only, or ``None`` if they are too many to be kept; as above."""
    several = [span for span in spans if isinstance(span, range)]
    return None if sum(map(len, several)) > _KEPT_ROWS else _make_index(spans), not several


def _make_index(spans: Sequence[Span]) -> Tensor:
    if torch.is_inference_mode_enabled():  # asked first, since the rest takes as long as the tensor
        with long_lived():
            return _new_index(spans)
    return _new_index(spans)


def _new_index(spans: Sequence[Span]) -> Tensor:
    if range not in map(type, spans):
        return torch.tensor(spans, dtype=torch.int64, device="cpu")
    ranges = [range(span, span + 1) if isinstance(span, int) else span for span in spans]
    return torch.cat([torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu") for rows in ranges])


class SlotTable:
    """The shared memory of slots: as many rows for the request of each slot as the layout says, and for its reply.

    A slot belongs to one client, which has one request under way. The client writes the request's rows, how many they
    are, the time, and then sends the slot's number; the server reads them once it has received the number, and how many
    they are only once. The server writes the reply's rows and their versions and then sends the number back; the
    client reads them once it has received that. The two system calls order the memory on any processor. Where a client
    gives a request up and writes the next one while the server still reads the old, what becomes of the old one is
    thrown away. The server writes the rows of a reply only for the request that it has read last, so a reply that the
    client has received changes only after its next request.

    Args:
        request: the layout of requests.
        reply: the layout of replies.
        count: how many slots there are.
        descriptor: of the memory, in another process than the one that made it; its own from now on.
    """

    @long_lived()
    def __init__(self, request: RowLayout, reply: RowLayout, count: int, descriptor: int | None = None) -> None:
        rows = request.rows
        tables = RowTable.nbytes(request, count), RowTable.nbytes(reply, count)
        sizes = (8 * count, 8 * count, 8 * count * rows, *tables)
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // 64) * 64)
        nbytes = max(1, starts[-1])
        create = AnonymousSharedMemory.create
        self.memory = create(nbytes) if descriptor is None else AnonymousSharedMemory(descriptor, nbytes, b"")
        pieces = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.times = self.memory.view[pieces[0]].cast("d")
        """When each slot's request was submitted, on the clock of ``time.perf_counter``."""
        self.counts = self.memory.view[pieces[1]].cast("q")
        """How many rows each slot's request has, if it has a dimension for them."""
        self.versions = self.memory.view[pieces[2]].cast("q")
        """Which weights computed each row of the replies."""
        self.first_versions = self.versions[::rows]
        """Which weights computed the first row of each slot's reply."""
        self._time_column = self.memory.memory[pieces[0]].view(torch.float64)
        self._version_column = self.memory.memory[pieces[2]].view(torch.int64)
        self._first_version_rows = self._version_column[::rows].unbind(0)
        self.requests = RowTable(request, count, self.memory.memory[pieces[3]], _index)
        self.replies = RowTable(reply, count, self.memory.memory[pieces[4]], _index)
        self.rows = rows
        """How many rows each slot has."""
        self._gathered: tuple[Sequence[Any], tuple[Rows, bool]] = (), _rows_of(())
        self._written = self.replies

    def leave_out(self, key: str | None) -> None:
        """Write no such entry of replies: the version, which has a place of its own, and may be declared all the same.

        The memory stays as it is, since clients may have mapped it.
        """
        self._written = self.replies if key is None else self.replies.without(key)

    def write_times(self, slots: Sequence[int], now: float) -> None:
        """Write when the requests of these slots were submitted."""
        if len(slots) > _FEW:
            self._time_column.index_fill_(0, _index(slots), now)
        else:
            for slot in slots:
                self.times[slot] = now

    def version(self, slot: int, size: torch.Size) -> Tensor:
        """Which weights computed a slot's reply ``[*size]`` of one row, as a tensor of the caller's own."""
        row = self._first_version_rows[slot]
        return row.expand(size).clone() if size else row.clone()

    def block(self, slot: int, count: int) -> SlotBlock:
        """The first ``count`` rows of a slot."""
        return SlotBlock(self, range(slot * self.rows, slot * self.rows + count))

    # -- batches (model thread) ------------------------------------------------------------------------

    def _rows(self, requests: Sequence[SlotRequest | SlotRequestPart]) -> tuple[Rows, bool]:
        if self._gathered[0] is not requests:
            self._gathered = requests, _rows_of([request.span for request in requests])
        return self._gathered[1]

    def gather(self, requests: Sequence[Any], allocate: Allocate | None) -> TensorDict:
        """Copy the rows of requests, in order, into a batch ``[N, ...]``."""
        return self.requests.gather(self._rows(requests)[0], allocate)

    def scatter(self, requests: Sequence[Any], output: TensorDictBase, keys: Set[str] | None, version: int) -> None:
        """Copy the rows of an output ``[N, ...]`` to the rows of the replies, and the version beside each.

        Args:
            requests: the requests that the rows answer.
            output: what the model returned.
            keys: the entries that replies have; ``None``: all.
            version: of the weights that computed it.

        Raises:
            ModelError: they are not of the layout that replies have.
        """
        rows, is_plain = self._rows(requests)
        self._written.scatter(rows, self._written.layout.batch_values(output, keys))
        if is_plain and len(requests) <= _FEW:
            for request in requests:
                self.versions[request.span] = version
        elif isinstance(rows, range):
            self._version_column[rows.start : rows.stop].fill_(version)
        else:
            self._version_column.index_fill_(0, rows, version)

    def write_reply(self, span: Span, reply: TensorDictBase, version_key: str | None) -> None:
        """Write the reply to one request.

        Raises:
            ModelError: it is not of the layout that replies have.
        """
        version = None
        if version_key is not None and (version := reply.get(version_key, None)) is not None:
            reply = reply.exclude(version_key)
        try:
            values = self._written.layout.values(reply.to("cpu"))
        except InvalidRequestError as error:
            raise ModelError(str(error)) from None
        if isinstance(span, int) and isinstance(values, list):
            self._written.write_one(span // self.rows, values)
            if version is not None:
                self.versions[span] = int(version.flatten()[0]) if version.numel() else 0
        elif isinstance(span, range) and isinstance(values, RowBlock) and values.rows == len(span):
            self._written.scatter(span, values.values)
            if version is not None and version.numel():
                self._version_column[span.start : span.stop].copy_(version.reshape(len(span), -1)[:, 0])
        else:
            rows = "no dimension of rows" if isinstance(span, int) else f"{len(span)} rows"
            raise ModelError(f"the response has batch size {list(reply.batch_size)}, the request has {rows}")


class SlotRequest(RemoteRequest):
    """A request in a slot; used again and again, as long as the one before is over and both are one row.

    Args:
        connection: of the process that made it.
        slot: where it lies.
        table: of the slot.
        caller: who has the slot.
    """

    caller: Caller
    store: SlotTable
    _td: TensorDictBase | None

    __slots__ = ("_parts", "_td", "slot", "span", "store", "under_way")

    def __init__(self, connection: ServerConnection, slot: int, table: SlotTable, caller: Caller) -> None:
        super().__init__(None, connection, 0, 0.0, None, caller)
        self.slot = slot
        self.store = table
        self.span: Span = slot * table.rows
        self.under_way = False
        self._parts: list[range] = []

    @property
    def td(self) -> TensorDictBase:
        """Its rows as they lie in memory, ``[*size]`` or ``[rows, *size]``; made when it is asked for."""
        if self._td is None:
            self._td = self.store.requests.td(self.span)
        return self._td

    @td.setter
    def td(self, td: TensorDictBase | None) -> None:
        self._td = td

    def take_rows(self, rows: int) -> None:
        """Be a request with a dimension of so many rows.

        Raises:
            ValueError: a slot has none, or not so many.
        """
        if self.batched and rows == self.rows:  # as before
            return
        if not 1 <= rows <= self.store.rows:
            raise ValueError(f"a request has {rows} rows, a slot {self.store.rows}")
        start = self.slot * self.store.rows
        self._locate(range(start, start + rows), rows, True)

    def take_one_row(self) -> None:
        """Be a request without a dimension of rows."""
        self._locate(self.slot * self.store.rows, 1, False)

    def _locate(self, span: Span, rows: int, batched: bool) -> None:
        self.span, self.rows, self.batched, self._td = span, rows, batched, None

    def part(self, start: int, stop: int, receiver: PartReceiver) -> Request:
        assert isinstance(self.span, range)
        span = self.span[start:stop]
        if start == 0:
            self._parts = []
        self._parts.append(span)
        return SlotRequestPart(self, span, receiver)

    def join(self, replies: Sequence[TensorDictBase]) -> TensorDictBase:
        version_key = self.sink.transport.queue.admission.version_key
        for span, reply in zip(self._parts, replies, strict=True):
            if reply is not WRITTEN_IN_PLACE:  # its batch had requests of other transports as well
                self.store.write_reply(span, reply, version_key)
        return WRITTEN_IN_PLACE


class SlotRequestPart(RequestPart):
    """Some rows of a request in a slot, whose reply is written in place too."""

    __slots__ = ("span", "store")

    def __init__(self, request: SlotRequest, span: range, receiver: PartReceiver) -> None:
        store = request.store
        super().__init__(store.requests.td(span), receiver, receiver.sink, request.submitted_at, request.mode)
        self.batched, self.rows = True, len(span)
        self.store: SlotTable = store
        self.span = span


class _SlotServerCodec(ServerCodec):
    def __init__(self, connection: ServerConnection, transport: ProcessSlotTransport) -> None:
        self._connection = connection
        self._transport = transport
        self._table = transport.table
        self._times = self._table.times
        self._slots: Sequence[int] = ()
        self._requests: list[SlotRequest] = []  # by client, its last one

    def accept(self, endpoint_id: bytes, count: int, layouts: str) -> tuple[Any, Sequence[int]]:
        if layouts != (ours := self._transport.client_codec().layouts):
            raise InvalidRequestError(f"the server at this address has {ours}; the client was made for {layouts}")
        self._slots = self._transport.acquire_slots(endpoint_id, count)
        self._requests = [self._request(slot, Caller()) for slot in self._slots]
        return self._slots, [self._transport.status.memory.fd, self._table.memory.fd]

    def _request(self, slot: int, caller: Caller) -> SlotRequest:
        return SlotRequest(self._connection, slot, self._table, caller)

    def decode(self, headers: Sequence[int]) -> Sequence[SlotRequest]:
        requests, times, counts = self._requests, self._times, self._table.counts
        decoded: list[SlotRequest] = []
        for first in headers:
            request = requests[first & CLIENT_INDEX]
            if request.under_way:  # its caller gave it up, or this one could not come
                request.cancelled = True
                request = requests[first & CLIENT_INDEX] = self._request(request.slot, request.caller)
            if first >= _BATCHED:
                request.take_rows(counts[request.slot])
            elif request.batched:
                request.take_one_row()
            request.number = first & NUMBER
            request.mode = MODES[first >> 56 & 7]
            request.submitted_at = request.caller.asked_at = times[request.slot]
            request.under_way = True
            request.cancelled = False
            decoded.append(request)
        return decoded

    def check(self, request: RemoteRequest, payload: bytes | None) -> None:
        admission = self._transport.queue.admission
        if admission.spec is not None:
            admission.check_spec(request.td, batched=request.batched)

    def find(self, number: int) -> RemoteRequest | None:
        request = self._requests[number & CLIENT_INDEX]
        return request if request.under_way and request.number == number else None

    def encode(
        self, requests: Sequence[SlotRequest], replies: Sequence[TensorDictBase]
    ) -> tuple[bytes, dict[RemoteRequest, Exception]]:
        failures: dict[RemoteRequest, Exception] = {}
        if replies[0] is not WRITTEN_IN_PLACE:  # either all are or none
            failures = self._write(requests, replies)
            requests = [request for request in requests if request not in failures]
        if len(requests) == 1:
            data = requests[0].number.to_bytes(8, sys.byteorder)
        else:
            data = array("Q", [request.number for request in requests]).tobytes()
        for request in requests:  # afterwards: another thread may use it again for the next request at once
            request.under_way = False
        return data, failures

    def _write(
        self, requests: Sequence[SlotRequest], replies: Sequence[TensorDictBase]
    ) -> dict[RemoteRequest, Exception]:
        failures: dict[RemoteRequest, Exception] = {}
        for request, reply in zip(requests, replies, strict=True):
            try:
                self._table.write_reply(request.span, reply, self._transport.queue.admission.version_key)
            except ModelError as error:
                failures[request] = error
        return failures

    def forget(self, request: SlotRequest) -> None:
        request.under_way = False

    def close(self) -> None:
        for request in self._requests:
            request.cancelled = True
        self._transport.release_slots(self._slots)


class SlotBlock:
    """The first rows of a slot, to which the next request is written, and from which the reply is read then."""

    __slots__ = ("_layout", "_replies", "_requests", "_size", "_versions", "count")

    @long_lived()
    def __init__(self, table: SlotTable, rows: range) -> None:
        self.count = len(rows)
        self._layout = table.replies.layout
        self._size = torch.Size([self.count, *self._layout.batch_size])
        self._requests = table.requests.block(rows)
        self._replies = table.replies.block(rows)
        self._versions = table._version_column[rows.start : rows.stop]

    def write(self, values: Sequence[Tensor]) -> None:
        """Copy the tensors of a request ``[count, *size]`` to their place."""
        for place, value in zip(self._requests, values, strict=True):
            place.copy_(value.detach() if value.requires_grad else value)

    def read(self, version_key: str, *, copy: bool) -> TensorDict:
        """The reply ``[count, *size]``, with the version of each row where a key is given."""
        values = [value.clone() for value in self._replies] if copy else self._replies
        source = self._layout.tree(values, self._size[:1])
        if version_key:
            versions = self._versions.view(-1, *[1] * (len(self._size) - 1))
            source[version_key] = versions.expand(self._size).clone(memory_format=torch.contiguous_format)
        return build(source, self._size, None)


class _SlotClientCodec(ClientCodec):
    exclusive = True

    def __init__(self, request: RowLayout, reply: RowLayout, num_slots: int) -> None:
        super().__init__()
        self._request = request
        self._reply = reply
        self._num_slots = num_slots
        self.max_rows = request.rows
        self.layouts = f"{num_slots} slots of {request.rows} rows, {request.signature()}, {reply.signature()}"
        self._reply_size = reply.batch_size
        self._table: SlotTable | None = None
        self._slots: Sequence[int] = ()
        self._blocks: dict[int, SlotBlock] = {}

    def accepted(self, ack: Any, descriptors: Sequence[int]) -> StatusPage:
        status, memory = map(os.dup, descriptors)
        self._slots = ack
        self._table = SlotTable(self._request, self._reply, self._num_slots, memory)
        self._status = StatusPage.opened(status)
        self._version_tensors = VersionTensorCache()
        self._blocks = {}  # by slot, where its last request has a dimension of rows
        return self._status

    def check(self, td: TensorDictBase | Entries) -> list[Value] | RowBlock:
        return self._request.values(td)

    def encode(self, requests: Sequence[OutgoingRequest]) -> bytes:
        table = self._table
        if table is None:  # it was closed meanwhile: what is sent goes nowhere
            return b""
        now = time.perf_counter()
        if len(requests) == 1:
            ((number, first, values),) = requests
            slot = self._slots[number & CLIENT_INDEX]
            table.times[slot] = now
            if type(values) is RowBlock:
                return self._encode_block(table, number, first, values)
            if self._blocks:
                self._blocks.pop(slot, None)
            table.requests.write_one(slot, values)
            return first.to_bytes(8, sys.byteorder)
        numbers, headers, payloads = zip(*requests, strict=True)
        if RowBlock in map(type, payloads):
            return b"".join([self.encode([request]) for request in requests])
        slots = [self._slots[number & CLIENT_INDEX] for number in numbers]
        for slot in self._blocks.keys() & slots if self._blocks else ():
            self._blocks.pop(slot, None)
        table.write_times(slots, now)
        table.requests.write(slots, payloads)
        return array("Q", headers).tobytes()

    def _encode_block(self, table: SlotTable, number: int, first: int, values: RowBlock) -> bytes:
        slot = self._slots[number & CLIENT_INDEX]
        block = self._blocks.get(slot)
        if block is None or block.count != values.rows:
            block = self._blocks[slot] = table.block(slot, values.rows)
        if values.rows == 0:
            self.answers[number] = block.read(self._status.version_key(), copy=True)
            return b""
        table.counts[slot] = values.rows
        block.write(values.values)
        return (first | _BATCHED).to_bytes(8, sys.byteorder)

    def decode(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> Sequence[TensorDictBase]:
        if len(numbers) == 1:
            return [self.decode_one(numbers[0])]
        table = self._table
        assert table is not None
        slots = [self._slots[number & CLIENT_INDEX] for number in numbers]
        if self._blocks and not self._blocks.keys().isdisjoint(slots):
            return [self.decode_one(number) for number in numbers]
        sources = table.replies.read_many(slots) if self.copies else [table.replies.view(slot) for slot in slots]
        size = self._reply_size
        key = self._status.version_key()
        if key:
            versions = self._versions([table.first_versions[slot] for slot in slots], size)
            for source, version in zip(sources, versions, strict=True):
                source[key] = version
        return [build(source, size, None) for source in sources]

    def decode_one(self, number: int) -> TensorDictBase:
        table = self._table
        assert table is not None
        slot = self._slots[number & CLIENT_INDEX]
        if self._blocks and (block := self._blocks.get(slot)) is not None:
            return block.read(self._status.version_key(), copy=self.copies)
        source = table.replies.read(slot) if self.copies else table.replies.view(slot)
        key = self._status.version_key()
        if key:
            source[key] = table.version(slot, self._reply_size)
        return build(source, self._reply_size, None)

    def _versions(self, versions: Sequence[int], size: torch.Size) -> Sequence[Tensor]:
        if versions.count(versions[0]) == len(versions):
            return self._version_tensors.make(versions[0], torch.Size([len(versions), *size]), None)
        return [torch.full(size, version, dtype=torch.int64, device="cpu") for version in versions]

    def close(self) -> None:
        self._table = None
        self._blocks = {}
