"""The wire half of a scheme: weights on one queue, acknowledgements on another."""

from __future__ import annotations

import queue
import time
from typing import Any, Protocol

from tensordict import TensorDictBase
from torch import nn

from aioinfer.errors import WeightSyncError
from aioinfer.weight_sync.lines import reason_of
from aioinfer.weight_sync.publications import Publication, message, opened
from aioinfer.weight_sync.snapshots import snapshot
from aioinfer.weight_sync.targets import ModelTarget
from aioinfer.weight_sync.weights import Strategy, Weights, WeightsLike, given_back, read

__all__ = ["MPTransport", "MessageQueue"]


class MessageQueue(Protocol):
    """What a queue must have: ``multiprocessing.Queue`` has it, ``queue.Queue`` too."""

    def put(self, obj: Any, /) -> None:
        """Append a message."""
        ...

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first message, or raise ``queue.Empty``."""
        ...


class MPTransport:
    """Sends weights from one process to another over queues of yours, one queue for each worker.

    A message is ``((model_id, weights), "update_weights")``. With a second queue, the worker acknowledges each: it
    puts the number of the message, counted from 1, and why it refused it (``None`` if it has not).

    The schemes use it over queues of their own, on which only descriptors of shared memory travel.

    Args:
        weight_queue: from the trainer to the worker.
        ack_queue: from the worker to the trainer.
        timeout: seconds to wait for weights or for an acknowledgement, where a call names no other.
    """

    def __init__(
        self, weight_queue: MessageQueue, ack_queue: MessageQueue | None = None, timeout: float = 10.0
    ) -> None:
        self.weight_queue = weight_queue
        self.ack_queue = ack_queue
        self.timeout = timeout
        self._sent = self._received = 0

    def send_weights_async(self, weights: WeightsLike | Publication, model_id: str = "policy") -> int:
        """Put a copy of ``weights``, as they are now, on the queue (trainer side).

        Args:
            weights: a module, a TensorDict or a state dict. A TensorDict arrives as one, anything
                else as a state dict.
            model_id: whose weights they are.

        Returns:
            The message's number, counted from 1.
        """
        if not isinstance(weights, Publication):
            strategy: Strategy = "tensordict" if isinstance(weights, TensorDictBase) else "state_dict"
            found = read(weights, strategy)
            weights = given_back(Weights(snapshot(found.tensors), found.extra_states), strategy)
        self.weight_queue.put(message(model_id, weights))
        self._sent += 1
        return self._sent

    def wait_ack(self, number: int | None = None, timeout: float | None = None) -> None:
        """Wait until the worker has acknowledged message ``number``, or the last one sent (trainer side).

        Raises:
            RuntimeError: there is no queue for acknowledgements.
            TimeoutError: it did not within ``timeout`` seconds.
            WeightSyncError: the worker has refused it.
        """
        if self.ack_queue is None:
            raise RuntimeError("an MPTransport without ack_queue knows nothing of acknowledgements")
        number = self._sent if number is None else number
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            try:
                acknowledged, reason = self.ack_queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"message {number} was not acknowledged") from None
            if acknowledged == number and reason is not None:
                raise WeightSyncError(reason)
            if acknowledged >= number:
                return

    def receive_weights(
        self, timeout: float | None = None, *, model: nn.Module | TensorDictBase | None = None
    ) -> WeightsLike | None:
        """Take the next weights from the queue, load them into ``model``, and acknowledge (worker side).

        Returns:
            The weights, as a TensorDict or a state dict; ``None`` if none came within ``timeout`` seconds.

        Raises:
            ValueError: something else is on the queue.
            WeightSyncError: the weights don't fit ``model``, which keeps the ones it had.
        """
        received = self.next_message(self.timeout if timeout is None else timeout)
        if received is None:
            return None
        weights: WeightsLike = received[1]
        self._received += 1
        try:
            if model is not None:
                ModelTarget(model).load(read(weights, "state_dict"))
        except BaseException as error:  # whatever it is, the sender must not wait for an answer in vain
            self._acknowledge(reason_of(error))
            raise
        self._acknowledge(None)
        return weights

    def next_message(self, timeout: float) -> tuple[str, Any] | None:
        """Take the next model id and weights; ``None`` if nothing came.

        Raises:
            ValueError: something else is on the queue.
        """
        try:
            return opened(self.weight_queue.get(timeout=timeout))
        except queue.Empty:
            return None

    def _acknowledge(self, reason: str | None) -> None:
        if self.ack_queue is not None:
            self.ack_queue.put((self._received, reason))
