"""The scheme by which nothing travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from aioinfer.weight_sync.peers import Delivery
from aioinfer.weight_sync.scheme import DeviceMapFn, WeightSyncScheme
from aioinfer.weight_sync.weights import WeightsLike

__all__ = ["NoWeightSyncScheme"]


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

    def _publish(self, *arguments: object, **options: object) -> Delivery:
        return Delivery()

    def _wait(self, delivery: Delivery) -> None:
        pass

    async def _await(self, delivery: Delivery) -> None:
        pass

    def _unawaited(self) -> list[Delivery]:
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
