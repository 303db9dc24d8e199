"""Weights travel from a trainer to the servers and workers that use them; see :class:`WeightSyncScheme`."""

from aioinfer.weight_sync.multiprocess import MultiProcessWeightSyncScheme
from aioinfer.weight_sync.nothing import NoWeightSyncScheme
from aioinfer.weight_sync.scheme import WeightSyncScheme
from aioinfer.weight_sync.shared_memory import SharedMemWeightSyncScheme
from aioinfer.weight_sync.transport import MPTransport

__all__ = [
    "MPTransport",
    "MultiProcessWeightSyncScheme",
    "NoWeightSyncScheme",
    "SharedMemWeightSyncScheme",
    "WeightSyncScheme",
]
