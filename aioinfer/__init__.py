"""One PyTorch policy, served to many callers at once, in batches.

The way of a request, and the files that it passes::

    client.py          transports/local.py      transports/queue.py       batching.py        forward.py
    a client of    --> puts it; tasks and   --> one queue for each    --> when a batch   --> stack, model, rows: one
    any transport      threads of this          server, FIFO, with        leaves, and        thread owns the model
                       process                  the bound                 why                 |
                            ^                                                                 v
                            '------------- transports/replies.py: one wake-up for each batch and event loop

    model_thread.py: wait, take a batch, run it, reply; jobs and pauses between   server.py: from start to shutdown

Between processes the same way, with a connection in it::

    transports/tickets.py     transports/station.py    ipc/sockets.py           transports/switchboard.py
    a client, that pickles -> its process's calls   -> one framed socket for -> a connection to each process
                              and their replies        each process

And the way of new weights, from a trainer in another process, or (``server.update_weights``) in this one::

    weight_sync/sender.py        weight_sync/receiver.py      weight_updates.py        model_thread.py
    snapshot in shared memory -> newest of the queue       -> does it fit? load it, -> between two
                                 of each worker               all or nothing           forward passes

``transports/base.py`` says how to write a transport, ``testing/contract.py`` what it must hold, and
``weight_sync/scheme.py`` what a trainer and its workers can say to each other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioinfer.batching import DispatchReason
    from aioinfer.client import AsyncInferenceClient, InferenceClient
    from aioinfer.errors import (
        ClientBusyError,
        ClientClosedError,
        InferenceError,
        InvalidRequestError,
        ModelError,
        NoFreeSlotError,
        PeerDiedError,
        ServerClosedError,
        ServerNotRunningError,
        ServerOverloadedError,
        ServerPausedError,
        ServerStartError,
        WeightSyncError,
    )
    from aioinfer.policy import PolicyClientModule
    from aioinfer.process_server import Health, ProcessInferenceServer
    from aioinfer.server import InferenceServer
    from aioinfer.stats import Percentiles, ServerStats
    from aioinfer.transports import (
        InferenceTransport,
        MPTransport,
        ProcessSlotTransport,
        Remote,
        SlotTransport,
        ThreadingTransport,
        connect,
    )

__all__ = [
    "AsyncInferenceClient",
    "ClientBusyError",
    "ClientClosedError",
    "DispatchReason",
    "Health",
    "InferenceClient",
    "InferenceError",
    "InferenceServer",
    "InferenceTransport",
    "InvalidRequestError",
    "MPTransport",
    "ModelError",
    "NoFreeSlotError",
    "PeerDiedError",
    "Percentiles",
    "PolicyClientModule",
    "ProcessInferenceServer",
    "ProcessSlotTransport",
    "Remote",
    "ServerClosedError",
    "ServerNotRunningError",
    "ServerOverloadedError",
    "ServerPausedError",
    "ServerStartError",
    "ServerStats",
    "SlotTransport",
    "ThreadingTransport",
    "WeightSyncError",
    "connect",
]

# Where the names above are made. A name is imported when it is first asked for, so that importing the package alone
# does not import torch: ``aioinfer --help`` takes 0.05 s instead of 3. They are searched in this order: modules without
# torch first, and ``weight_sync`` last, which has another ``MPTransport``.
_MODULES = ("errors", "batching", "client", "stats", "policy", "transports", "server", "process_server", "weight_sync")

if not TYPE_CHECKING:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            for home in _MODULES:
                module = import_module(f"{__name__}.{home}")
                if name in module.__all__:
                    globals()[name] = value = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
