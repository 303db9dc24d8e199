"""The schemes: over queues and shared memory, for unlike weights or one weight set, and one that does nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDictBase
from torch import nn

from aioinfer.weight_sync.channel import Channel
from aioinfer.weight_sync.receiver import Receiver, WeightReceiver
from aioinfer.weight_sync.scheme import WeightSyncScheme
from aioinfer.weight_sync.sender import DeviceMapFn, DistributionPlan, Sender, Work
from aioinfer.weight_sync.weights import Strategy, WeightsLike

__all__ = ["MultiProcessWeightSyncScheme", "NoWeightSyncScheme", "SharedMemWeightSyncScheme"]

_MAX_MODEL_ID = 256  # characters; it is in every message


class QueuedWeightSyncScheme(WeightSyncScheme):
    """Base of the schemes over queues, which describe its arguments.

    Any thread may call the methods of the trainer; one thread at a time owns the side of the worker.
    """

    def __init__(
        self,
        strategy: Strategy = "tensordict",
        sync: bool = True,
        *,
        num_workers: int | None = None,
        timeout: float = 10.0,
        cast: bool = False,
    ) -> None:
        super().__init__(strategy, sync)
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.timeout = timeout
        self.cast = cast
        self._channels: dict[int, Channel] = {worker: Channel() for worker in range(num_workers or 0)}
        self._worker_idx: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._sender: Sender | None = None
        self._unawaited: list[Work] = []
        self._connected = False
        self._receiver: WeightReceiver | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("strategy", "sync", "timeout", "cast", "_channels", "_worker_idx")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def for_worker(self, worker_idx: int) -> Self:
        """Make the scheme of one worker, for this process or another: it has the queues of that worker alone.

        Raises:
            ValueError: an unknown worker.
        """
        twin = type(self).__new__(type(self))
        channels = {worker_idx: self._channel(worker_idx)}
        twin.__setstate__({**self.__getstate__(), "_channels": channels, "_worker_idx": worker_idx})
        return twin

    # -- the trainer -----------------------------------------------------------------------------------

    def init_on_sender(
        self,
        *,
        model_id: str | None = None,
        context: Any = None,
        weights: WeightsLike | None = None,
        model: nn.Module | None = None,
        params_map: Mapping[int, WeightsLike] | None = None,
        devices: Sequence[torch.device | str | int] | None = None,
        device_map_fn: DeviceMapFn | None = None,
        num_workers: int | None = None,
        ctx: Any = None,
    ) -> None:
        del ctx  # the queues need none
        model_id = "policy" if model_id is None else model_id
        if len(model_id) > _MAX_MODEL_ID:
            raise ValueError(f"model_id may have {_MAX_MODEL_ID} characters, got {len(model_id)}")
        if weights is not None and model is not None:
            raise ValueError("weights and model are two sources of what is published; give one of them")
        source = weights if model is None else model
        if context is not None and source is None and params_map is None:
            source = _find_model(context, model_id)
            if devices is None and num_workers is None:
                num_workers = getattr(context, "num_workers", None)
        plan = DistributionPlan(
            self.strategy,
            source=source,
            params_map=params_map,
            devices=devices,
            device_map_fn=device_map_fn,
            num_workers=num_workers,
            known_workers=tuple(self._channels),
        )
        self._check_plan(plan)
        if not self._channels:
            self._channels = {worker: Channel() for worker in plan.workers}
        elif unknown := [worker for worker in plan.workers if worker not in self._channels]:
            raise ValueError(f"this scheme has queues for workers {sorted(self._channels)}, not for {unknown}")
        self._reset()
        channels = {worker: self._channels[worker] for worker in plan.workers}
        self._sender = Sender(plan, channels, model_id=model_id, timeout=self.timeout)

    def _check_plan(self, plan: DistributionPlan) -> None:
        """Raise :class:`ValueError` for a plan that this scheme can't execute."""

    def _publish(
        self,
        weights: WeightsLike | None,
        worker_ids: int | Sequence[int] | None,
        version: int | None,
        *,
        sequential: bool = False,
        timeout: float | None = None,
    ) -> Work:
        sender = self._sending()
        if not self._connected:
            raise RuntimeError("call connect() before the first send()")
        return sender.publish(weights, worker_ids, version, sequential=sequential, timeout=timeout)

    def _wait(self, work: Work) -> None:
        self._sending().wait(work)

    async def _async_wait(self, work: Work) -> None:
        await self._sending().async_wait(work)

    def _pending(self) -> list[Work]:
        self._sending()
        return self._unawaited

    def _sending(self) -> Sender:
        sender = self._sender  # read once: another thread may shut down meanwhile
        if sender is None or self._pid != os.getpid():
            raise RuntimeError("call init_on_sender() first, in the process that sends")
        return sender

    # -- the worker ------------------------------------------------------------------------------------

    def init_on_receiver(
        self,
        *,
        model_id: str,
        context: Any = None,
        worker_idx: int | None = None,
        model: nn.Module | TensorDictBase | None = None,
    ) -> None:
        if context is not None:
            worker_idx = getattr(context, "worker_idx", None) if worker_idx is None else worker_idx
            model = _find_model(context, model_id) if model is None else model
        if self._pid != os.getpid():  # a forked child of the trainer, which is no trainer
            self._reset()
        self._worker_idx = self._own_worker_idx() if worker_idx is None else worker_idx
        channel = self._channel(self._worker_idx)
        self._receiver = WeightReceiver(channel, model_id, model, strategy=self.strategy, cast=self.cast)

    def receive(self, timeout: float | None = None) -> WeightsLike | None:
        receiver = self._receiver
        if receiver is None or self._pid != os.getpid():
            raise RuntimeError("call init_on_receiver() before receive(), in the process that receives")
        return receiver.receive(self.timeout if timeout is None else timeout)

    def open_receiver(self, model_id: str, *, thread: int) -> Receiver:
        return Receiver(self._channel(self._own_worker_idx()), model_id, thread=thread)

    def _own_worker_idx(self) -> int:
        if self._worker_idx is not None:
            return self._worker_idx
        if len(self._channels) > 1:
            raise ValueError(
                f"there are workers {sorted(self._channels)}; "
                "name this one with init_on_receiver(worker_idx=...), or use for_worker()"
            )
        return next(iter(self._channels), 0)

    def _channel(self, worker_idx: int) -> Channel:
        if worker_idx not in self._channels:
            known = f"there are {sorted(self._channels)}" if self._channels else "init_on_sender() comes first"
            raise ValueError(f"worker {worker_idx} is not registered; {known}")
        return self._channels[worker_idx]

    # -- both ------------------------------------------------------------------------------------------

    def connect(
        self, worker_idx: int | None = None, *, version: int | None = None, timeout: float | None = None
    ) -> None:
        receiver, sender = self._receiver, self._sender
        own_idx = receiver is not None and not receiver.is_open and worker_idx == self._worker_idx
        if receiver is not None and (sender is None or own_idx):
            if worker_idx not in (None, self._worker_idx):
                raise ValueError(f"this is worker {self._worker_idx}, not {worker_idx}")
            receiver.connect(self.timeout if timeout is None else timeout)
            return
        if sender is None:
            raise RuntimeError("call init_on_sender() or init_on_receiver() before connect()")
        self._connected = True
        work = self._publish(None, worker_idx, version, sequential=True, timeout=timeout)
        if timeout is not None:
            sender.wait(work, timeout)
        elif self.sync:
            sender.wait_connected(work)

    def shutdown(self) -> None:
        sender, receiver = self._sender, self._receiver
        if sender is not None and self._pid == os.getpid():
            sender.close()
        if receiver is not None and self._pid == os.getpid():
            receiver.close()
        self._reset()
        self._channels = {}


def _find_model(context: Any, model_id: str) -> Any:
    """The model that a context calls ``model_id``: from its ``get_model``, or an attribute, which may be dotted."""
    find = getattr(context, "get_model", None)
    return attrgetter(model_id)(context) if find is None else find(model_id)


class MultiProcessWeightSyncScheme(QueuedWeightSyncScheme):
    """Sends weights that may differ from worker to worker. Each worker copies them into its own memory.

    The snapshot lies in shared memory, and each worker's queue carries a descriptor of it. Workers that get the same
    weights read the same snapshot. Where workers get different weights, and with ``sync``, copies are made for one
    worker after the other, in the same memory.

    Args:
        strategy: see :class:`WeightSyncScheme`.
        sync: see :class:`WeightSyncScheme`.
        num_workers: make the queues of so many workers now. Else ``init_on_sender`` makes them, and then has to
            run before the scheme is handed to the other processes.
        timeout: seconds that workers have to answer, and that a worker waits for weights.
        cast: whether workers convert weights of another dtype than their model's, instead of refusing them.
    """


class SharedMemWeightSyncScheme(QueuedWeightSyncScheme):
    """Sends one weight set to all workers, in one snapshot in shared memory.

    A server on a CPU with ``swap_weights=True`` computes straight from that memory: there is one copy of the weights
    for all servers of the machine, and an update makes no other. The trainer writes the next snapshot elsewhere, and
    uses this memory again when no server reads it any more. Where a parameter is on another device, or has another
    dtype or other strides, such a server fills a staging buffer beside its forward passes instead.

    Its arguments are those of :class:`MultiProcessWeightSyncScheme`.

    Raises:
        ValueError: ``init_on_sender`` is asked for weights that differ from worker to worker.
    """

    shares_memory: ClassVar[bool] = True

    def _check_plan(self, plan: DistributionPlan) -> None:
        if not plan.is_uniform:
            raise ValueError(
                "SharedMemWeightSyncScheme has one weight set for all workers; "
                "MultiProcessWeightSyncScheme takes params_map and device_map_fn"
            )


class NoWeightSyncScheme(WeightSyncScheme):
    """Has the interface of a scheme, and does nothing: workers keep the weights that they have."""

    def init_on_sender(
        self,
        *,
        model_id: str | None = None,
        context: Any = None,
        weights: WeightsLike | None = None,
        model: nn.Module | None = None,
        params_map: Mapping[int, WeightsLike] | None = None,
        devices: Sequence[torch.device | str | int] | None = None,
        device_map_fn: DeviceMapFn | None = None,
        num_workers: int | None = None,
        ctx: Any = None,
    ) -> None:
        pass

    def _publish(self, *arguments: object, **options: object) -> Work:
        return Work()

    def _wait(self, work: Work) -> None:
        pass

    async def _async_wait(self, work: Work) -> None:
        pass

    def _pending(self) -> list[Work]:
        return []

    def init_on_receiver(
        self,
        *,
        model_id: str,
        context: Any = None,
        worker_idx: int | None = None,
        model: nn.Module | TensorDictBase | None = None,
    ) -> None:
        pass

    def receive(self, timeout: float | None = None) -> None:
        return None

    def open_receiver(self, model_id: str, *, thread: int) -> None:
        return None

    def connect(
        self, worker_idx: int | None = None, *, version: int | None = None, timeout: float | None = None
    ) -> None:
        pass

    def shutdown(self) -> None:
        pass
