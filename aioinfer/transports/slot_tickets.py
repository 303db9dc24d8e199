"""Process slots, as their clients see them."""

from __future__ import annotations

import os
import sys
import time
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aioinfer.ipc.sockets import frame, header, send_once
from aioinfer.rows import RowLayout
from aioinfer.tensors import build
from aioinfer.transports.control import Control, FromClient
from aioinfer.transports.receivers import Asked
from aioinfer.transports.slot_memory import SlotMemory
from aioinfer.transports.station import Station
from aioinfer.transports.tickets import Ticket
from aioinfer.versions import VersionTensorCache

__all__ = ["SlotTicket"]

_PLACE = (1 << 32) - 1


class SlotTicket(Ticket):
    """Clients that have a slot each.

    Args:
        address: where the server listens.
        count: how many clients.
        request: the layout of requests.
        reply: the layout of replies.
        num_slots: how many slots the server has.
    """

    def __init__(self, address: str, count: int, *, request: RowLayout, reply: RowLayout, num_slots: int) -> None:
        super().__init__(address, count, one_at_a_time=True)
        self.request = request
        self.reply = reply
        self.num_slots = num_slots

    def _reset(self) -> None:
        super()._reset()
        self.lessor: weakref.ref[Any] | None = None
        """The transport that keeps slots for clients that were not used yet, if it is of this process."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "lessor"}

    def layouts(self) -> str:
        """What both ends must agree about, to read the shared memory alike."""
        return f"{self.num_slots} slots, {self.request.signature()}, {self.reply.signature()}"

    def _connect(self) -> Station:
        return _SlotStation(self)

    def _give_back(self) -> None:
        lessor = None if self.lessor is None else self.lessor()
        if lessor is None or not lessor.release(self.id):
            send_once(self.address, frame(header(FromClient.RELEASE), self.id))

    def cargo(self, td: TensorDictBase) -> list[Tensor]:
        return self.request.values(td)


class _SlotStation(Station):
    def __init__(self, ticket: SlotTicket) -> None:
        self._layouts = ticket.request, ticket.reply, ticket.num_slots
        self._reply_size = ticket.reply.batch_size
        self._copies = ticket.copies
        self._memory: SlotMemory | None = None
        self._slots: Sequence[int] = ()
        self._stamps = VersionTensorCache()
        super().__init__(ticket.address, ticket.id, ticket.count, ticket.layouts())

    def _welcome(self, news: Any, descriptors: Sequence[int]) -> Control:
        control, memory = map(os.dup, descriptors)
        self._slots = news
        self._memory = SlotMemory(*self._layouts, memory)
        return Control.opened(control)

    def _release(self) -> None:
        self._memory = None

    def _load(self, asked: Sequence[Asked]) -> bytes:
        memory = self._memory
        if memory is None:  # it was closed meanwhile: what is sent goes nowhere
            return b""
        now = time.perf_counter()
        if len(asked) == 1:
            ((number, text, values),) = asked
            slot = self._slots[number & _PLACE]
            memory.times[slot] = now
            memory.requests.write_one(slot, values)
            return text.to_bytes(8, sys.byteorder)
        numbers, texts, requests = zip(*asked, strict=True)
        slots = [self._slots[number & _PLACE] for number in numbers]
        memory.note_times(slots, now)
        memory.requests.write(slots, requests)
        return array("Q", texts).tobytes()

    def _unload(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> Sequence[TensorDictBase]:
        if len(numbers) == 1:
            return [self._unload_one(numbers[0])]
        memory, control = self._memory, self.control
        assert memory is not None
        assert control is not None
        slots = [self._slots[number & _PLACE] for number in numbers]
        sources = memory.replies.read_many(slots) if self._copies else [memory.replies.view(slot) for slot in slots]
        size = self._reply_size
        key = control.version_key()
        if key:
            for source, tensor in zip(
                sources, self._stamp([memory.versions[slot] for slot in slots], size), strict=True
            ):
                source[key] = tensor
        return [build(source, size, None) for source in sources]

    def _unload_one(self, number: int) -> TensorDictBase:
        memory, control = self._memory, self.control
        assert memory is not None
        assert control is not None
        slot = self._slots[number & _PLACE]
        source = memory.replies.read(slot) if self._copies else memory.replies.view(slot)
        key = control.version_key()
        if key:
            source[key] = memory.version(slot, self._reply_size)
        return build(source, self._reply_size, None)

    def _stamp(self, versions: Sequence[int], size: torch.Size) -> Sequence[Tensor]:
        if versions.count(versions[0]) == len(versions):
            return self._stamps.make(versions[0], torch.Size([len(versions), *size]), None)
        return [torch.full(size, version, dtype=torch.int64, device="cpu") for version in versions]
