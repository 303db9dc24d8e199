"""The trainer's half: publishes snapshots to the workers, and waits for what becomes of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from aioinfer.errors import WeightSyncError
from aioinfer.ipc.selector import Source, await_readable, wait_readable
from aioinfer.weight_sync.channels import Channel
from aioinfer.weight_sync.peers import Delivery, Peer
from aioinfer.weight_sync.publications import Shelf
from aioinfer.weight_sync.weights import Weights

__all__ = ["Part", "Sender"]

# A waiting thread looks again this often, in seconds: another one that waits may have read the answer for it.
_LOOK_AGAIN = 0.05

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """Weights, and who gets them.

    Attributes:
        weights: as they are when the part is asked for.
        workers: by index.
        devices: for some of them, where a worker without a model gets the tensors.
    """

    weights: Weights
    workers: Sequence[int]
    devices: Mapping[int, str] = field(default_factory=dict)


class Sender:
    """Any thread may call. ``_lock`` guards the peers and what is published; nobody holds it while waiting.

    A signal handler may close it at any moment: a call that the handler has interrupted closes it as it ends.

    Args:
        channels: of each worker, by index.
        model_id: whose weights are published.
        timeout: seconds that workers have to answer.
    """

    def __init__(self, channels: Mapping[int, Channel], *, model_id: str, timeout: float) -> None:
        self._peers = {worker: Peer(worker, channel) for worker, channel in channels.items()}
        self._model_id = model_id
        self._timeout = timeout
        self._shelf = Shelf()
        self._lock = threading.RLock()
        self._busy = False  # under the lock
        self._closed = False

    def publish(
        self,
        parts: Iterable[Part],
        *,
        version: int | None,
        named: bool = False,
        in_turn: bool = False,
        patience: float | None = None,
    ) -> Delivery:
        """Take a snapshot of each part, and leave it in the queues of its workers.

        Args:
            parts: asked for one after the other, so that one can be freed before the next is made.
            version: the sender's own number for the weights.
            named: whether the caller has named the workers; then those that have shut down count as failed.
            in_turn: before the next part is asked for, wait until the workers that are there have applied this one.
            patience: seconds to wait for workers, also for the successors of those that have died; ``None``: those of
                the sender, and for no successors.
        """
        delivery = Delivery(patient=patience is not None)
        iterator = iter(parts)
        while (part := next(iterator, None)) is not None:
            workers = part.workers
            self._alone(partial(self._publish, part, delivery, version=version, named=named))
            del part  # now, not when the next one is there
            if in_turn:
                self._wait(delivery, self._there(workers), patience)
        return delivery

    def _publish(self, part: Part, delivery: Delivery, *, version: int | None, named: bool) -> None:
        if self._closed:
            raise RuntimeError("the scheme was shut down")
        peers = [self._peers[worker] for worker in part.workers]
        for peer in peers:
            peer.settle()
        try:
            publication, stored = self._shelf.publish(part.weights, version)
        except OSError as error:  # what came before stays published
            if error.errno is None:  # out of a signal handler
                raise
            raise WeightSyncError(f"there is no memory for the weights: {error}") from error
        for peer in peers:
            device = part.devices.get(peer.worker)
            peer.deliver(publication, stored, model_id=self._model_id, device=device, delivery=delivery, named=named)

    def _there(self, workers: Iterable[int]) -> set[int]:
        """Those that live, and don't need this very thread to receive."""
        peers = [self._peers[worker] for worker in workers]

        def settle() -> set[int]:
            for peer in peers:
                peer.settle()
            return {peer.worker for peer in peers if peer.is_there and not peer.is_blocked_by_this_thread}

        return self._alone(settle)

    # -- wait ------------------------------------------------------------------------------------------

    def wait(self, delivery: Delivery, timeout: float | None = None) -> None:
        """Block until all workers have answered, or ``timeout`` seconds passed; ``None``: those of the sender.

        Raises:
            WeightSyncError: it names the workers that refused, died or did not answer, and says why.
        """
        for worker in self._awaited(delivery):
            if self._peers[worker].is_blocked_by_this_thread:
                delivery.fail(worker, "receives on the event loop that this call blocks; await asend() instead")
        self._wait(delivery, self._peers.keys(), timeout)
        self._give_up(delivery, timeout)

    def wait_for_those_there(self, delivery: Delivery) -> None:
        """Do as :meth:`wait` for those that are there and don't need this very thread; to be slow is no failure."""
        self._wait(delivery, self._there(self._peers))
        delivery.check()

    async def await_(self, delivery: Delivery) -> None:
        """Do as :meth:`wait`, without blocking the event loop."""
        deadline = time.monotonic() + self._timeout
        while (sources := self._sources(delivery, self._peers.keys())) and (left := self._left(deadline)) > 0:
            await await_readable(sources, min(left, _LOOK_AGAIN))
        self._give_up(delivery)

    def _wait(self, delivery: Delivery, workers: Iterable[int], timeout: float | None = None) -> None:
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while (sources := self._sources(delivery, workers)) and (left := self._left(deadline)) > 0:
            wait_readable(sources, min(left, _LOOK_AGAIN))

    def _left(self, deadline: float) -> float:
        """Seconds; none once the sender is closed."""
        return 0.0 if self._closed else deadline - time.monotonic()

    def _awaited(self, delivery: Delivery) -> list[int]:
        def settle() -> list[int]:
            for worker in tuple(delivery.waiting):
                self._peers[worker].settle()
            return sorted(delivery.waiting)

        return self._alone(settle)

    def _sources(self, delivery: Delivery, workers: Iterable[int]) -> list[Source]:
        """What to wait for; nothing if all of ``workers`` have answered."""
        awaited = set(self._awaited(delivery)) & set(workers)
        return [source for worker in awaited for source in self._peers[worker].sources]

    def _give_up(self, delivery: Delivery, timeout: float | None = None) -> None:
        seconds = self._timeout if timeout is None else timeout

        def fail() -> None:
            for worker in tuple(delivery.waiting):
                if self._closed:
                    reason = "had not answered when the scheme was shut down"
                elif self._peers[worker].is_there:
                    reason = f"did not answer within {seconds:g} s"
                else:
                    reason = f"has not connected within {seconds:g} s"
                delivery.fail(worker, reason)

        self._alone(fail)
        delivery.check()

    # -- the lock, and the end -------------------------------------------------------------------------

    def _alone(self, do: Callable[[], T]) -> T:
        with self._lock:
            if self._busy:
                raise RuntimeError("a signal handler that has interrupted a call of a scheme can't send with it")
            self._busy = True
            try:
                return do()
            finally:
                self._busy = False
                if self._closed:
                    self._hang_up()

    def close(self) -> None:
        """End the lines to the workers, and all waiting; what they have not read yet stays in their queues."""
        self._closed = True
        with self._lock:
            if not self._busy:
                self._hang_up()

    def _hang_up(self) -> None:
        for peer in self._peers.values():
            peer.hang_up()
