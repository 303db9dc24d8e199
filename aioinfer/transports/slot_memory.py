"""The shared memory of process slots: a row for the request of each slot, and one for its reply."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.modes import long_lived
from aioinfer.rows import RowLayout, RowTable
from aioinfer.tensors import Allocate

__all__ = ["SlotMemory"]


# Of so many sets of slots the index is kept: to make one takes 3 to 5 us, and callers tend to come back together.
_KNOWN = 1024
# Up to so many times or versions are written one by one.
_FEW = 16


class _InSlot(Protocol):
    slot: int


class _Indices:
    """Tensors of the numbers of slots, of which those that were used lately are kept."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, slots: Sequence[int]) -> Tensor:
        wanted = tuple(slots)
        index = self._known.get(wanted)
        if index is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            index = self._known[wanted] = self._make(wanted)
        return index

    def _make(self, slots: tuple[int, ...]) -> Tensor:
        if torch.is_inference_mode_enabled():  # asked first, since the rest takes as long as the tensor
            with long_lived():
                return torch.tensor(slots, dtype=torch.int64, device="cpu")
        return torch.tensor(slots, dtype=torch.int64, device="cpu")


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

    @long_lived()
    def __init__(self, request: RowLayout, reply: RowLayout, count: int, descriptor: int | None = None) -> None:
        sizes = (8 * count, 8 * count, RowTable.nbytes(request, count), RowTable.nbytes(reply, count))
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // 64) * 64)
        nbytes = max(1, starts[-1])
        self.segment = (
            AnonymousSharedMemory.create(nbytes)
            if descriptor is None
            else AnonymousSharedMemory(descriptor, nbytes, b"")
        )
        pieces = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.times = self.segment.view[pieces[0]].cast("d")
        """When each slot's request was submitted, on the clock of ``time.perf_counter``."""
        self.versions = self.segment.view[pieces[1]].cast("q")
        """Which weights computed each slot's reply."""
        self._time_column = self.segment.memory[pieces[0]].view(torch.float64)
        self._version_column = self.segment.memory[pieces[1]].view(torch.int64)
        self._version_rows = self._version_column.unbind(0)
        self._index = _Indices()
        self.requests = RowTable(request, count, self.segment.memory[pieces[2]], self._index)
        self.replies = RowTable(reply, count, self.segment.memory[pieces[3]], self._index)
        self._gathered: tuple[Sequence[_InSlot], Tensor] = (), self._index(())
        self._written = self.replies

    def leave_out(self, key: str | None) -> None:
        """Write no such entry of replies: the version, which has a place of its own, and may be declared all the same.

        The memory stays as it is, since clients may have mapped it.
        """
        self._written = self.replies if key is None else self.replies.without(key)

    def note_times(self, slots: Sequence[int], now: float) -> None:
        """Write when the requests of these slots were submitted."""
        if len(slots) > _FEW:
            self._time_column.index_fill_(0, self._index(slots), now)
        else:
            for slot in slots:
                self.times[slot] = now

    def version(self, slot: int, size: torch.Size) -> Tensor:
        """Which weights computed a slot's reply ``[*size]``, as a tensor of the caller's own."""
        row = self._version_rows[slot]
        return row.expand(size).clone() if size else row.clone()

    # -- the server's side -----------------------------------------------------------------------------

    def _slots(self, requests: Sequence[_InSlot]) -> Tensor:
        if self._gathered[0] is not requests:
            self._gathered = requests, self._index([request.slot for request in requests])
        return self._gathered[1]

    def gather(self, requests: Sequence[_InSlot], allocate: Allocate | None) -> TensorDict:
        return self.requests.gather(self._slots(requests), allocate)

    def scatter(self, requests: Sequence[_InSlot], output: TensorDictBase, keys: Set[str] | None, version: int) -> None:
        slots = self._slots(requests)
        self._written.scatter(slots, self._written.layout.batch_values(output, keys))
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
            values = self._written.layout.values(reply.to("cpu"))
        except InvalidRequestError as error:
            raise ModelError(str(error)) from None
        self._written.write_one(slot, values)
