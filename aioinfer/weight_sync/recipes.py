"""Who gets which weights: stored when a trainer begins, made each time that it sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from aioinfer.weight_sync.scheme import DeviceMapFn
from aioinfer.weight_sync.sender import Part
from aioinfer.weight_sync.weights import Strategy, WeightsLike, as_tensordict, read

__all__ = ["Recipe"]


class Recipe:
    """Makes the weights of each worker, one after the other; for the arguments see ``init_on_sender``."""

    def __init__(
        self,
        strategy: Strategy,
        *,
        source: WeightsLike | None,
        params_map: Mapping[int, WeightsLike] | None,
        devices: Sequence[torch.device | str | int] | None,
        device_map_fn: DeviceMapFn | None,
        num_workers: int | None,
        known_workers: Sequence[int],
    ) -> None:
        _check_ways(source, params_map, devices, device_map_fn, num_workers)
        self._strategy = strategy
        self._source = source
        self._params_map = params_map
        self._device_map_fn = device_map_fn
        if params_map is not None:
            self.workers: tuple[int, ...] = tuple(params_map)
        elif devices is not None:
            self.workers = tuple(range(len(devices)))
        elif num_workers is not None:
            self.workers = tuple(range(num_workers))
        else:
            self.workers = tuple(known_workers) or (0,)
        self._devices = {worker: str(torch.device(device)) for worker, device in enumerate(devices or ())}

    @property
    def one_for_all(self) -> bool:
        """Whether all workers get the same weights."""
        sets = {} if self._params_map is None else {id(weights) for weights in self._params_map.values()}
        return len(sets) <= 1 and self._device_map_fn is None

    def parts(self, weights: WeightsLike | None, workers: Sequence[int]) -> Iterator[Part]:
        """The weights for ``workers``. Each part is made when it is asked for, and not kept.

        Args:
            weights: what the trainer sends; ``None``: what the recipe was made of.
            workers: by index.
        """
        if weights is None and self._params_map is not None:
            sharing: dict[int, list[int]] = {}
            for worker in workers:
                sharing.setdefault(id(self._params_map[worker]), []).append(worker)
            for group in sharing.values():
                yield Part(read(self._params_map[group[0]], self._strategy), group)
            return
        source = self._source if weights is None else weights
        if source is None:
            raise ValueError("there are no weights to send: pass some, or give init_on_sender a model")
        if self._device_map_fn is None:
            yield Part(read(source, self._strategy), workers, self._devices)
            return
        base = as_tensordict(read(source, self._strategy).detached())
        for worker in workers:
            yield Part(read(self._device_map_fn(worker, base), self._strategy), [worker])


def _check_ways(
    source: WeightsLike | None,
    params_map: Mapping[int, WeightsLike] | None,
    devices: Sequence[Any] | None,
    device_map_fn: DeviceMapFn | None,
    num_workers: int | None,
) -> None:
    given = {"devices": devices, "device_map_fn": device_map_fn, "num_workers": num_workers}
    named = [name for name, value in given.items() if value is not None]
    if params_map is not None:
        if source is not None or named:
            mixed = ", ".join([*(["weights or model"] if source is not None else []), *named])
            raise ValueError(f"params_map says who gets what; it can't be mixed with {mixed}")
        if not params_map:
            raise ValueError("params_map is empty")
        return
    if source is None:
        raise ValueError("init_on_sender needs weights, a model, a context that has it, or params_map")
    if devices is not None and device_map_fn is not None:
        raise ValueError("devices and device_map_fn are two ways to say who gets what; give one of them")
    if device_map_fn is not None and num_workers is None:
        raise ValueError("device_map_fn needs num_workers")
    if devices is not None and num_workers not in (None, len(devices)):
        raise ValueError(f"there are {len(devices)} devices for num_workers={num_workers}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
