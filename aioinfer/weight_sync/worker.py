"""A worker that is no server: it receives where it calls ``receive``."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import nn

from aioinfer.weight_sync.channels import Channel
from aioinfer.weight_sync.receiver import Arrival, Receiver
from aioinfer.weight_sync.snapshots import snapshot
from aioinfer.weight_sync.targets import ModelTarget
from aioinfer.weight_sync.weights import Strategy, Weights, WeightsLike, given_back, read

__all__ = ["PlainWorker"]


class PlainWorker:
    """Receives weights into a model, in the thread that calls; see ``WeightSyncScheme.init_on_receiver``."""

    def __init__(
        self,
        channel: Channel,
        model_id: str,
        model: nn.Module | TensorDictBase | None,
        *,
        strategy: Strategy,
        cast: bool,
    ) -> None:
        self._channel = channel
        self._model_id = model_id
        self._model = model
        self._target = None if model is None else ModelTarget(model, cast=cast)
        self._strategy = strategy
        self._receiver: Receiver | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has said hello to the trainer."""
        return self._receiver is not None

    def connect(self, timeout: float) -> None:
        """Say hello, and wait for the first weights."""
        if self._receiver is None:
            self._receiver = Receiver(self._channel, self._model_id)
        if self.receive(timeout) is None:
            raise TimeoutError(f"no weights came within {timeout:g} s; connect() may be called again")

    def receive(self, timeout: float) -> WeightsLike | None:
        """Apply the newest weights, or return ``None`` if none come within ``timeout`` seconds."""
        if self._receiver is None:
            raise RuntimeError("connect() comes before receive()")
        arrival = self._receiver.next(timeout)
        if arrival is None:
            return None
        try:
            weights = self._apply(arrival)
            arrival.applied()
        except BaseException as error:  # whatever it is, the sender must not wait for an answer in vain
            if self._target is not None and self._target.in_use is arrival.weights:  # as of a signal handler, too late
                arrival.applied()
            else:
                arrival.refused(error)
            raise
        return given_back(weights, self._strategy)

    def _apply(self, arrival: Arrival) -> Weights:
        if self._target is None or self._model is None:
            own = snapshot(arrival.weights.tensors)
            if arrival.device is not None:
                own = {name: tensor.to(arrival.device) for name, tensor in own.items()}
            return Weights(own, arrival.weights.extra_states)
        self._target.load(arrival.weights)
        return read(self._model, self._strategy).detached()

    def close(self) -> None:
        """Say farewell to the trainer."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
