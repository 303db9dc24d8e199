"""The scheme for one weight set that all workers read."""

from __future__ import annotations

from typing import ClassVar

from aioinfer.weight_sync.queued import QueuedWeightSyncScheme
from aioinfer.weight_sync.recipes import Recipe

__all__ = ["SharedMemWeightSyncScheme"]


class SharedMemWeightSyncScheme(QueuedWeightSyncScheme):
    """One snapshot in shared memory for all workers; only a notice travels.

    A server on a CPU with ``swap_weights=True`` computes straight from that memory: there is one copy of the weights
    for all servers of the machine, and none is made when they change. The trainer writes the next snapshot elsewhere,
    and comes back to this memory when no server uses it any more. Where a parameter is on another device, or has
    another dtype or other strides, such a server fills a spare copy beside its passes instead.

    Args:
        strategy: see :class:`WeightSyncScheme`.
        sync: see :class:`WeightSyncScheme`.
        num_workers: make the queues of so many workers now. Else ``init_on_sender`` makes them, and then has to
            run before the scheme is handed to the other processes.
        timeout: seconds that workers have to answer, and that a worker waits for weights.
        cast: whether workers convert weights of another dtype than their model's, instead of refusing them.

    Raises:
        ValueError: ``init_on_sender`` is asked for weights that differ from worker to worker.
    """

    lends: ClassVar[bool] = True

    def _check_recipe(self, recipe: Recipe) -> None:
        if not recipe.one_for_all:
            raise ValueError(
                "SharedMemWeightSyncScheme has one weight set for all workers; "
                "MultiProcessWeightSyncScheme takes params_map and device_map_fn"
            )
