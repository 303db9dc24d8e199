"""The scheme for weights that may differ from worker to worker."""

from __future__ import annotations

from aioinfer.weight_sync.queued import QueuedWeightSyncScheme

__all__ = ["MultiProcessWeightSyncScheme"]


class MultiProcessWeightSyncScheme(QueuedWeightSyncScheme):
    """Weights travel through one queue for each worker, each of which copies them into its own memory.

    What is on the queue is a descriptor; the snapshot itself lies in shared memory. Workers that get the same
    weights read the same snapshot. Where they get unlike ones, and with ``sync``, copies are made for one worker after
    the other, in the same memory.

    Args:
        strategy: see :class:`WeightSyncScheme`.
        sync: see :class:`WeightSyncScheme`.
        num_workers: make the queues of so many workers now. Else ``init_on_sender`` makes them, and then has to
            run before the scheme is handed to the other processes.
        timeout: seconds that workers have to answer, and that a worker waits for weights.
        cast: whether workers convert weights of another dtype than their model's, instead of refusing them.
    """
