"""One PyTorch policy, served to many callers at once, in batches.

The way of a request inside one process, file by file::

    client.py           transports/local.py      transports/queue.py     batching.py          forward.py
    InferenceClient --> a client puts a      --> one queue for each  --> does a batch     --> stack, model, rows
    (what callers       request, with the        server, FIFO, with      leave now, and
    hold)               sink of its reply        one bound               why? learned_rule.py      |
                                                                                                   |
    await, or return <--------- transports/replies.py: one wake-up for each batch and loop <-------+

    model_thread.py owns the model: wait, take a batch, run it, reply; jobs and pauses in between
    plan.py is what runs for a TensorDict module: the functions that it is made of
    server.py starts and ends it, and hosts its background tasks on an event loop

Between processes, with a connection in it::

    transports/ipc/client.py   transports/ipc/connection.py   ipc/sockets.py      transports/ipc/server.py
    a client that pickles  --> the pending calls of its   --> frames, one     --> decodes requests, and puts
                               process, and who reads         socket for each     them into the queue
                                                              process
    transports/ipc/slots.py and transports/ipc/pickled.py: the codecs of both ends

Over a network, robots, HTTP callers and clients on other machines::

    web/app.py          web/openpi.py, web/stream.py, web/act.py   web/front.py      web/backend.py
    which path is   --> and web/open_inference.py:             --> limits and    --> asks a server, as
    served by what      a protocol each                            sessions          any client does
    transports/network/ is the other end of web/stream.py, and serve/ the command ``aioinfer serve``

New weights, from a trainer in another process, or (``server.update_weights``) in this one::

    weight_sync/sender.py        weight_sync/receiver.py    weight_updates.py        model_thread.py
    snapshot in shared memory -> the newest one, in     --> does it fit? load it, -> between two
                                 each worker                all or nothing           forward passes

``transports/base.py`` says what a server needs of a transport, ``transports/polling.py`` how to write a minimal one,
``testing/contract.py`` what it must hold, and ``weight_sync/scheme.py`` what a trainer and its workers can say to each
other. ``process_server/`` is a server in a process of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioinfer.batching import BatchingRule, DispatchReason, LeaveWhenFree
    from aioinfer.client import AsyncInferenceClient, InferenceClient
    from aioinfer.errors import (
        AccessDeniedError,
        ClientBusyError,
        ClientClosedError,
        CollectorError,
        DeadlineExceededError,
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
        SupersededError,
        WeightSyncError,
    )
    from aioinfer.learned_rule import LearnedRule
    from aioinfer.policy import PolicyClientModule
    from aioinfer.process_server import Health, ProcessInferenceServer
    from aioinfer.server import InferenceServer
    from aioinfer.stats import Percentiles, ServerStats
    from aioinfer.transports import (
        InferenceTransport,
        MPTransport,
        ProcessSlotTransport,
        RemoteServer,
        SlotTransport,
        ThreadingTransport,
        connect,
    )

__all__ = [
    "AccessDeniedError",
    "AsyncInferenceClient",
    "BatchingRule",
    "ClientBusyError",
    "ClientClosedError",
    "CollectorError",
    "DeadlineExceededError",
    "DispatchReason",
    "Health",
    "InferenceClient",
    "InferenceError",
    "InferenceServer",
    "InferenceTransport",
    "InvalidRequestError",
    "LearnedRule",
    "LeaveWhenFree",
    "MPTransport",
    "ModelError",
    "NoFreeSlotError",
    "PeerDiedError",
    "Percentiles",
    "PolicyClientModule",
    "ProcessInferenceServer",
    "ProcessSlotTransport",
    "RemoteServer",
    "ServerClosedError",
    "ServerNotRunningError",
    "ServerOverloadedError",
    "ServerPausedError",
    "ServerStartError",
    "ServerStats",
    "SlotTransport",
    "SupersededError",
    "ThreadingTransport",
    "WeightSyncError",
    "connect",
]

# Where the names above are made. A name is imported when it is first asked for, so that importing the package alone
# does not import torch: ``aioinfer --help`` takes 0.05 s instead of 3. They are searched in this order: modules without
# torch first, and ``weight_sync`` last, which has another ``MPTransport``.
_MODULES = (
    *("errors", "batching", "learned_rule", "client", "stats", "policy"),
    *("transports", "server", "process_server", "weight_sync"),
)

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
