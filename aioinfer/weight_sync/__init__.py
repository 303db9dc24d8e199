"""Weights travel from a trainer to the servers and workers that use them; see :class:`WeightSyncScheme`."""

from aioinfer.weight_sync.queue_transport import MPTransport
from aioinfer.weight_sync.scheme import WeightSyncScheme
from aioinfer.weight_sync.schemes import (
    MultiProcessWeightSyncScheme,
    NoWeightSyncScheme,
    SharedMemWeightSyncScheme,
)

__all__ = [
    "MPTransport",
    "MultiProcessWeightSyncScheme",
    "NoWeightSyncScheme",
    "SharedMemWeightSyncScheme",
    "WeightSyncScheme",
]
