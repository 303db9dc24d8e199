"""Weights on their way from the parent to a process that serves."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aioinfer.hosting.hotline import Hotline
from aioinfer.hosting.orders import FromParent
from aioinfer.weight_sync.publications import Publication, Shelf, Stored
from aioinfer.weight_sync.queues import DescriptorQueue
from aioinfer.weight_sync.weights import WeightsLike, check_version, read

__all__ = ["Deliveries"]


@dataclass(slots=True)
class _Delivery:
    publication: Publication
    stored: Stored
    cast: bool
    done: Future[None] = field(default_factory=Future)


class Deliveries:
    """Snapshots in shared memory, handed over one after the other; the next waits until the last is in use.

    Any thread may deliver. ``_lock`` guards everything.

    Args:
        hotline: to the process.
        queue: where the process finds them.
    """

    def __init__(self, hotline: Hotline, queue: DescriptorQueue) -> None:
        self._hotline = hotline
        self._queue = queue
        self._shelf = Shelf()
        self._waiting: deque[_Delivery] = deque()
        self._under_way = False  # one at most: the queue of descriptors is short
        self._lock = threading.Lock()

    def deliver(self, weights: WeightsLike, version: int | None, *, cast: bool) -> Future[None]:
        """Copy weights as they are now; the future, which can't be cancelled, resolves when they are in use.

        Raises:
            TypeError: they are none, or ``version`` is no integer.
            ValueError: ``version`` does not fit into 64 bits.
        """
        check_version(version)
        found = read(weights, "tensordict")
        with self._lock:
            publication, stored = self._shelf.publish(found, version)
            stored.readers += 1
            delivery = _Delivery(publication, stored, cast)
            delivery.done.set_running_or_notify_cancel()
            self._waiting.append(delivery)
        self._go_on()
        return delivery.done

    def _go_on(self) -> None:
        while (delivery := self._next()) is not None:
            try:
                self._queue.put(delivery.publication)
                answer = self._hotline.ask(FromParent.UPDATE, delivery.cast)
            except Exception as error:
                self._finish(delivery, error)
            else:
                answer.add_done_callback(partial(self._answered, delivery))
                return

    def _next(self) -> _Delivery | None:
        with self._lock:
            if self._under_way or not self._waiting:
                return None
            self._under_way = True
            return self._waiting.popleft()

    def _answered(self, delivery: _Delivery, answer: Future[Any]) -> None:
        self._finish(delivery, answer.exception())
        self._go_on()

    def _finish(self, delivery: _Delivery, error: BaseException | None) -> None:
        with self._lock:
            delivery.stored.readers -= 1
            self._under_way = False
        if error is None:
            delivery.done.set_result(None)
        else:
            delivery.done.set_exception(error)
