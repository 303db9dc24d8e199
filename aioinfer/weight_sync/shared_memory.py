"""The scheme for one weight set that all workers read."""

from __future__ import annotations

from typing import ClassVar

from aioinfer.weight_sync.queued import QueuedWeightSyncScheme
from aioinfer.weight_sync.recipes import Recipe

__all__ = ["SharedMemWeightSyncScheme"]


class SharedMemWeightSyncScheme(QueuedWeightSyncScheme):
    """One snapshot in shared memory for all workers; only a notice travels.

    A server with ``swap_weights=True`` computes straight from that memory: there is one copy of the weights for all
    servers of the machine, and none is made when they change. The trainer writes the next snapshot
    elsewhere, and comes back to this memory when no server uses it any more.

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
