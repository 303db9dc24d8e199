"""What the schemes that send have in common: a channel for each worker, and the two parts to play."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from torch import nn

from aioinfer.weight_sync.channels import Channel
from aioinfer.weight_sync.peers import Delivery
from aioinfer.weight_sync.receiver import Receiver
from aioinfer.weight_sync.recipes import Recipe
from aioinfer.weight_sync.scheme import DeviceMapFn, WeightSyncScheme
from aioinfer.weight_sync.sender import Sender
from aioinfer.weight_sync.weights import Strategy, WeightsLike, check_version
from aioinfer.weight_sync.worker import PlainWorker

__all__ = ["QueuedWeightSyncScheme"]


_LONGEST_NAME = 256  # of a model, in characters: it is in every message


class QueuedWeightSyncScheme(WeightSyncScheme):
    """Base of the schemes over queues, which describe its arguments.

    Any thread may send; a worker's part belongs to one thread at a time.
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
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._sender: Sender | None = None
        self._recipe: Recipe | None = None
        self._published: list[Delivery] = []
        self._connected = False
        self._worker: PlainWorker | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("strategy", "sync", "timeout", "cast", "_channels", "_worker_idx")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def for_worker(self, worker_idx: int) -> Self:
        """Make the scheme of one worker, for this process or another: it holds that worker's queues alone.

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
        del ctx  # the queues are made without one
        model_id = "policy" if model_id is None else model_id
        if len(model_id) > _LONGEST_NAME:
            raise ValueError(f"model_id may have {_LONGEST_NAME} characters, got {len(model_id)}")
        if weights is not None and model is not None:
            raise ValueError("weights and model both say what is published; give one of them")
        source = weights if model is None else model
        if context is not None and source is None and params_map is None:
            source = _model_of(context, model_id)
            if devices is None and num_workers is None:
                num_workers = getattr(context, "num_workers", None)
        recipe = Recipe(
            self.strategy,
            source=source,
            params_map=params_map,
            devices=devices,
            device_map_fn=device_map_fn,
            num_workers=num_workers,
            known_workers=tuple(self._channels),
        )
        self._check_recipe(recipe)
        if not self._channels:
            self._channels = {worker: Channel() for worker in recipe.workers}
        elif unknown := [worker for worker in recipe.workers if worker not in self._channels]:
            raise ValueError(f"this scheme has queues for workers {sorted(self._channels)}, not for {unknown}")
        self._forget()
        channels = {worker: self._channels[worker] for worker in recipe.workers}
        self._recipe = recipe
        self._sender = Sender(channels, model_id=model_id, timeout=self.timeout)

    def _check_recipe(self, recipe: Recipe) -> None:
        """Raise :class:`ValueError` for what this scheme can't do."""

    def _publish(
        self,
        weights: WeightsLike | None,
        worker_ids: int | Sequence[int] | None,
        version: int | None,
        *,
        in_turn: bool = False,
        patience: float | None = None,
    ) -> Delivery:
        sender, recipe = self._trainer()
        if not self._connected:
            raise RuntimeError("connect() comes before the first send()")
        check_version(version)
        workers = recipe.workers
        if worker_ids is not None:
            workers = (worker_ids,) if isinstance(worker_ids, int) else tuple(worker_ids)
            if unknown := [worker for worker in workers if worker not in recipe.workers]:
                raise ValueError(f"unknown workers {unknown}; there are {list(recipe.workers)}")
            if len(set(workers)) < len(workers):
                raise ValueError(f"worker_ids names a worker twice: {list(workers)}")
        parts = recipe.parts(weights, workers)
        in_turn = in_turn and not recipe.one_for_all
        named = worker_ids is not None
        return sender.publish(parts, version=version, named=named, in_turn=in_turn, patience=patience)

    def _wait(self, delivery: Delivery) -> None:
        self._trainer()[0].wait(delivery)

    async def _await(self, delivery: Delivery) -> None:
        await self._trainer()[0].await_(delivery)

    def _unawaited(self) -> list[Delivery]:
        self._trainer()
        return self._published

    def _trainer(self) -> tuple[Sender, Recipe]:
        sender, recipe = self._sender, self._recipe  # once: a shutdown may come meanwhile
        if sender is None or recipe is None or self._pid != os.getpid():
            raise RuntimeError("init_on_sender() comes first, in the process that sends")
        return sender, recipe

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
            model = _model_of(context, model_id) if model is None else model
        if self._pid != os.getpid():  # forked from the trainer, whose part is not played here
            self._forget()
        self._worker_idx = self._own_worker_idx() if worker_idx is None else worker_idx
        channel = self._channel(self._worker_idx)
        self._worker = PlainWorker(channel, model_id, model, strategy=self.strategy, cast=self.cast)

    def receive(self, timeout: float | None = None) -> WeightsLike | None:
        worker = self._worker
        if worker is None or self._pid != os.getpid():
            raise RuntimeError("init_on_receiver() comes before receive(), in the process that receives")
        return worker.receive(self.timeout if timeout is None else timeout)

    def open_receiver(self, model_id: str, *, thread: int) -> Receiver:
        return Receiver(self._channel(self._own_worker_idx()), model_id, thread=thread)

    def _own_worker_idx(self) -> int:
        if self._worker_idx is not None:
            return self._worker_idx
        if len(self._channels) > 1:
            raise ValueError(
                f"there are workers {sorted(self._channels)}; "
                "say which one this is, with init_on_receiver or for_worker"
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
        worker, sender = self._worker, self._sender
        named = worker is not None and not worker.is_open and worker_idx == self._worker_idx
        if worker is not None and (sender is None or named):
            if worker_idx not in (None, self._worker_idx):
                raise ValueError(f"this is worker {self._worker_idx}, not {worker_idx}")
            worker.connect(self.timeout if timeout is None else timeout)
            return
        if sender is None:
            raise RuntimeError("init_on_sender() or init_on_receiver() comes before connect()")
        self._connected = True
        delivery = self._publish(None, worker_idx, version, in_turn=True, patience=timeout)
        if timeout is not None:
            sender.wait(delivery, timeout)
        elif self.sync:
            sender.wait_for_those_there(delivery)

    def shutdown(self) -> None:
        sender, worker = self._sender, self._worker
        if sender is not None and self._pid == os.getpid():
            sender.close()
        if worker is not None and self._pid == os.getpid():
            worker.close()
        self._forget()
        self._channels = {}


def _model_of(context: Any, model_id: str) -> Any:
    """The model that a context calls ``model_id``: by its ``get_model``, or as an attribute, which may be dotted."""
    find = getattr(context, "get_model", None)
    return attrgetter(model_id)(context) if find is None else find(model_id)
