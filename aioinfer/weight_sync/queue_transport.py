"""Weights over queues of the user's: weights on one queue, acknowledgements on another."""

from __future__ import annotations

import queue
import time
from typing import Any, Protocol

from tensordict import TensorDictBase
from torch import nn

from aioinfer.errors import WeightSyncError
from aioinfer.weight_sync.channel import make_message, nack_reason, parse_message
from aioinfer.weight_sync.loader import WeightLoader
from aioinfer.weight_sync.snapshot import clone_tensors
from aioinfer.weight_sync.weights import Strategy, Weights, WeightsLike, extract_weights, to_strategy

__all__ = ["MPTransport", "MessageQueue"]


class MessageQueue(Protocol):
    """The methods that a queue needs. ``multiprocessing.Queue`` and ``queue.Queue`` have them."""

    def put(self, obj: Any, /) -> None:
        """Append a message."""
        ...

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first message, or raise ``queue.Empty``."""
        ...


class MPTransport:
    """Sends weights from one process to another over queues of yours, one queue for each worker.

    A message is ``((model_id, weights), "update_weights")``. With a second queue, the worker acknowledges each
    message: it puts the message's number, counted from 1, and the reason for a refusal, or ``None``.

    The schemes send messages of the same form over queues of their own, with references to shared memory as weights.

    One thread at a time may use it at each end.

    Args:
        weight_queue: from the trainer to the worker.
        ack_queue: from the worker to the trainer.
        timeout: seconds to wait for weights or for an acknowledgement, unless a call gives its own.
    """

    def __init__(
        self, weight_queue: MessageQueue, ack_queue: MessageQueue | None = None, timeout: float = 10.0
    ) -> None:
        self.weight_queue = weight_queue
        self.ack_queue = ack_queue
        self.timeout = timeout
        self._sent = self._received = 0

    def send_weights_async(self, weights: WeightsLike, model_id: str = "policy") -> int:
        """Put a copy of ``weights``, as they are now, on the queue (trainer side).

        Args:
            weights: a module, a TensorDict or a state dict. A TensorDict arrives as one, anything
                else as a state dict.
            model_id: whose weights they are.

        Returns:
            The message's number, counted from 1.
        """
        strategy: Strategy = "tensordict" if isinstance(weights, TensorDictBase) else "state_dict"
        found = extract_weights(weights, strategy)
        copied = to_strategy(Weights(clone_tensors(found.tensors), found.extra_states), strategy)
        self.weight_queue.put(make_message(model_id, copied))
        self._sent += 1
        return self._sent

    def wait_ack(self, number: int | None = None, timeout: float | None = None) -> None:
        """Wait until the worker has acknowledged message ``number``, or the last one sent (trainer side).

        Raises:
            RuntimeError: there is no queue for acknowledgements.
            TimeoutError: the worker did not acknowledge it within ``timeout`` seconds.
            WeightSyncError: the worker has refused it.
        """
        if self.ack_queue is None:
            raise RuntimeError("an MPTransport without ack_queue receives no acknowledgements")
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
            ValueError: there is another object in the queue.
            WeightSyncError: the weights don't fit ``model``, which keeps the ones it had.
        """
        try:
            message = self.weight_queue.get(timeout=self.timeout if timeout is None else timeout)
        except queue.Empty:
            return None
        weights: WeightsLike = parse_message(message)[1]
        self._received += 1
        try:
            if model is not None:
                WeightLoader(model).load(extract_weights(weights, "state_dict"))
        except BaseException as error:  # the sender waits for an answer, whatever was raised
            self._acknowledge(nack_reason(error))
            raise
        self._acknowledge(None)
        return weights

    def _acknowledge(self, reason: str | None) -> None:
        if self.ack_queue is not None:
            self.ack_queue.put((self._received, reason))
