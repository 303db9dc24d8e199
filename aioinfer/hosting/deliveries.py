"""Weights on their way from the parent to a process that serves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from aioinfer.errors import WeightSyncError, clone_exception
from aioinfer.hosting.completion import Completion
from aioinfer.hosting.hotline import Call, Hotline
from aioinfer.hosting.orders import FromParent
from aioinfer.ipc.pickling import dumps
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.weight_sync.snapshot import SnapshotBuffer, SnapshotPool, SnapshotRef
from aioinfer.weight_sync.weights import WeightsLike, check_version, extract_weights

__all__ = ["Deliveries"]


@dataclass(slots=True)
class _Delivery:
    publication: SnapshotRef
    stored: SnapshotBuffer
    cast: bool
    done: Completion[None] = field(default_factory=Completion)


class Deliveries:
    """Snapshots in shared memory, handed over in FIFO order; the next one waits until the last is in use.

    Any thread: ``deliver``, which takes no lock. The hotline's thread: the rest.

    Args:
        hotline: to the process.
        queue: where the process finds them.
    """

    def __init__(self, hotline: Hotline, queue: DescriptorQueue) -> None:
        self._hotline = hotline
        self._queue = queue
        # Whoever delivers takes a shelf, or makes one, and puts it back. One whose filling was interrupted may be half
        # written, and does not come back.
        self._shelves: deque[SnapshotPool] = deque()
        self._waiting: deque[_Delivery] = deque()
        self._under_way = False  # one at most: the queue of descriptors is short

    def deliver(self, weights: WeightsLike, version: int | None, *, cast: bool) -> Completion[None]:
        """Copy weights as they are now; settled when they are in use.

        Raises:
            TypeError: they are none, or ``version`` is no integer.
            ValueError: ``version`` does not fit into 64 bits.
        """
        check_version(version)
        found = extract_weights(weights, "tensordict")
        try:
            shelf = self._shelves.pop()
        except IndexError:
            shelf = SnapshotPool()
        publication, stored = shelf.take(found, version)
        stored.refcount += 1
        delivery = _Delivery(publication, stored, cast)
        self._hotline.call_soon(partial(self._accept, delivery))
        self._shelves.append(shelf)
        return delivery.done

    def _accept(self, delivery: _Delivery) -> None:
        if self._hotline.refusal is not None:
            delivery.done.fail(clone_exception(self._hotline.refusal))
        else:
            self._waiting.append(delivery)
            self._go_on()

    def _go_on(self) -> None:
        while self._waiting and not self._under_way:
            delivery = self._waiting.popleft()
            if self._hotline.refusal is not None:
                self._finish(delivery, clone_exception(self._hotline.refusal))
                continue
            try:
                self._queue.put(delivery.publication)
            except Exception as error:
                what = f"{type(error).__qualname__}: {error}"
                self._finish(delivery, WeightSyncError(f"the weights could not be sent: {what}"))
                continue
            self._under_way = True
            call = self._hotline.new_call()
            call.then = partial(self._answered, delivery)
            self._hotline.send(call, FromParent.UPDATE, dumps((delivery.cast,)))

    def _answered(self, delivery: _Delivery, call: Call) -> None:
        self._under_way = False
        self._finish(delivery, call.error)
        self._go_on()

    def _finish(self, delivery: _Delivery, error: BaseException | None) -> None:
        delivery.stored.refcount -= 1
        if error is None:
            delivery.done.succeed(None)
        else:
            delivery.done.fail(error)
