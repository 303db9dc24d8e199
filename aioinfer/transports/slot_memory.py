"""The shared memory of process slots: a row for the request of each slot, and one for its reply."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aioinfer.columns import Columns, RowLayout
from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.segments import Segment
from aioinfer.tensors import Allocate

__all__ = ["SlotMemory"]


# Of so many sets of slots the index is kept: to make one takes 3 to 5 us, and callers tend to come back together.
_KNOWN = 1024
# Up to so many times or versions are written one by one.
_FEW = 16


class _InSlot(Protocol):
    slot: int


class SlotMemory:
    """Rows of requests and of replies.

    A slot belongs to one client, which has one request under way. The client writes the request's row, the time, and
    then sends the slot's number; the server reads them once it has received the number. The server writes the
    reply's row and version and then sends the number back; the client reads them once it has received that. The
    two system calls order the memory on any processor. Where a client gives a request up and writes the next one while
    the server still reads the old, what becomes of the old one is thrown away. The server writes a reply's row only
    for the request that it has read last, so a reply that the client has received changes only after its next request.

    Args:
        request: the layout of requests.
        reply: the layout of replies.
        count: how many slots there are.
        descriptor: of the memory, in another process than the one that made it; its own from now on.
    """

    def __init__(self, request: RowLayout, reply: RowLayout, count: int, descriptor: int | None = None) -> None:
        sizes = (8 * count, 8 * count, Columns.nbytes(request, count), Columns.nbytes(reply, count))
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // 64) * 64)
        nbytes = max(1, starts[-1])
        self.segment = Segment.create(nbytes) if descriptor is None else Segment(descriptor, nbytes, b"")
        pieces = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.times = self.segment.view[pieces[0]].cast("d")
        """When each slot's request was submitted, on the clock of ``time.perf_counter``."""
        self.versions = self.segment.view[pieces[1]].cast("q")
        """Which weights computed each slot's reply."""
        self._time_column = self.segment.memory[pieces[0]].view(torch.float64)
        self._version_column = self.segment.memory[pieces[1]].view(torch.int64)
        self.requests = Columns(request, count, self.segment.memory[pieces[2]], self._index)
        self.replies = Columns(reply, count, self.segment.memory[pieces[3]], self._index)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._gathered: tuple[Sequence[_InSlot], Tensor] = ((), torch.empty(0))

    def _index(self, slots: Sequence[int]) -> Tensor:
        known = tuple(slots)
        index = self._indices.get(known)
        if index is None:
            if len(self._indices) >= _KNOWN:
                self._indices.clear()
            index = self._indices[known] = torch.tensor(known)
        return index

    def note_times(self, slots: Sequence[int], now: float) -> None:
        """Write when the requests of these slots were submitted."""
        if len(slots) > _FEW:
            self._time_column.index_fill_(0, self._index(slots), now)
        else:
            for slot in slots:
                self.times[slot] = now

    # -- the server's side -----------------------------------------------------------------------------

    def _slots(self, requests: Sequence[_InSlot]) -> Tensor:
        if self._gathered[0] is not requests:
            self._gathered = requests, self._index([request.slot for request in requests])
        return self._gathered[1]

    def gather(self, requests: Sequence[_InSlot], allocate: Allocate | None) -> TensorDict:
        return self.requests.gather(self._slots(requests), allocate)

    def scatter(self, requests: Sequence[_InSlot], output: TensorDictBase, keys: Set[str] | None, version: int) -> None:
        slots = self._slots(requests)
        self.replies.scatter(slots, self.replies.layout.batch_values(output, keys))
        if len(requests) > _FEW:
            self._version_column.index_fill_(0, slots, version)
        else:
            for request in requests:
                self.versions[request.slot] = version

    def put_reply(self, slot: int, reply: TensorDictBase, version_key: str | None) -> None:
        """Write one reply.

        Raises:
            ModelError: it is not of the layout that replies have.
        """
        version = None if version_key is None else reply.get(version_key, None)
        if version_key is not None and version is not None:
            self.versions[slot] = int(version.flatten()[0]) if version.numel() else 0
            reply = reply.exclude(version_key)
        try:
            values = self.replies.layout.values(reply.to("cpu"))
        except InvalidRequestError as error:
            raise ModelError(str(error)) from None
        self.replies.write_one(slot, values)
