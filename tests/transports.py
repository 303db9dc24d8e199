"""The transports over which the contract suite runs. A new transport is one more line in ``TRANSPORTS``."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tensordict import TensorDictBase

from aioinfer import InferenceTransport, MPTransport, ProcessSlotTransport, SlotTransport, ThreadingTransport
from aioinfer.testing import double, request


class FiveVerbs(InferenceTransport):
    """What a user writes: the five verbs, nothing else, and no care for cancelled futures."""

    def __init__(self) -> None:
        self.queue: queue.Queue[tuple[TensorDictBase, Future[TensorDictBase]]] = queue.Queue()
        self.peeked: list[tuple[TensorDictBase, Future[TensorDictBase]]] = []

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        future: Future[TensorDictBase] = Future()
        self.queue.put((td, future))
        return future

    def wait_for_work(self, timeout: float) -> None:
        if not self.peeked:
            try:
                self.peeked.append(self.queue.get(timeout=timeout))
            except queue.Empty:
                pass

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        taken = self.peeked[:max_items]
        del self.peeked[:max_items]
        while len(taken) < max_items:
            try:
                taken.append(self.queue.get_nowait())
            except queue.Empty:
                break
        return [td for td, _ in taken], [future for _, future in taken]

    def resolve(self, callback: Future[TensorDictBase], result: TensorDictBase) -> None:
        callback.set_result(result)

    def resolve_exception(self, callback: Future[TensorDictBase], exc: BaseException) -> None:
        callback.set_exception(exc)


def process_slots(asked: TensorDictBase | None = None, reply: TensorDictBase | None = None) -> ProcessSlotTransport:
    return ProcessSlotTransport(
        request(0) if asked is None else asked,
        double(request(0)) if reply is None else reply,
        num_slots=16,
        rows=16,
    )


# Of one server: "joined" is a list of transports.
TRANSPORTS: dict[str, Callable[..., Any]] = {
    "threading": ThreadingTransport,
    "slots": lambda: SlotTransport(16),
    "slots-preallocated": lambda: SlotTransport(16, preallocate=True),
    "five-verbs": FiveVerbs,
    "joined": lambda: [ThreadingTransport(), SlotTransport(2)],
    "mp": MPTransport,
    "process-slots": process_slots,
}
FIXED_LAYOUT = {"process-slots"}
REMOTE = {"mp", "process-slots"}
CANNOT_DROP_CANCELLED = {"five-verbs"}


def slots(count: int, address: str | None = None) -> ProcessSlotTransport:
    return ProcessSlotTransport(request(0), double(request(0)), num_slots=count, address=address)
