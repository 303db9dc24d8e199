"""Looks inside servers, transports and clients, for tests that must act at an exact moment.

It may change between versions.
"""

from __future__ import annotations

import socket
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.ipc.selector import Selector, Source
from aioinfer.process_server.parent import WeightSender
from aioinfer.process_server.server import ProcessInferenceServer
from aioinfer.server import InferenceServer
from aioinfer.transports.ipc.client import ClientBase
from aioinfer.transports.ipc.connection import ClientConnection
from aioinfer.transports.ipc.server import ProcessTransport
from aioinfer.transports.ipc.slots import ProcessSlotTransport, SlotTable
from aioinfer.weight_sync.channel import Channel
from aioinfer.weight_sync.schemes import QueuedWeightSyncScheme
from aioinfer.weight_sync.sender import Sender

if TYPE_CHECKING:
    from aioinfer.collectors import AsyncBatchedCollector

__all__ = [
    "channel_of",
    "connection_of",
    "has_pending_command",
    "has_pending_job",
    "has_waiting_callers",
    "ignore_in_wait",
    "let_call_time_out",
    "locks_of",
    "look_for_late_calls",
    "put_bytes",
    "sender_of",
    "slot_table_of",
    "weight_sender_of",
]

# -- servers -----------------------------------------------------------------------------------------------


def has_pending_job(server: InferenceServer) -> bool:
    """Whether a pause, or an update of the weights, waits for the forward pass that runs now."""
    thread = server._model_thread
    return thread is not None and bool(thread._jobs)


def has_waiting_callers(server: InferenceServer) -> bool:
    """Whether any caller waits until the queue has space, which ``max_pending`` bounds."""
    return bool(server._queue.not_full)


def has_pending_command(server: ProcessInferenceServer) -> bool:
    """Whether a command waits for the response of the server's process."""
    return server._connection.has_pending


def weight_sender_of(server: ProcessInferenceServer) -> WeightSender:
    """What sends weights to the process of a running server."""
    assert server._weight_sender is not None, "the server does not run"
    return server._weight_sender


# -- clients of other processes ----------------------------------------------------------------------------


def connection_of(client: object) -> ClientConnection | None:
    """The connection of this process that a client uses; ``None`` before its first request."""
    assert isinstance(client, ClientBase), f"{type(client).__qualname__} has no connection"
    connection: ClientConnection | None = client._endpoint.connection
    return connection


def locks_of(transport: ProcessTransport, client: object) -> list[AbstractContextManager[Any]]:
    """The locks of a transport, and of a client of it that has connected, which another thread may hold at a fork."""
    connection = connection_of(client)
    assert isinstance(client, ClientBase)
    assert connection is not None, "the client has not connected"
    connections = transport.connections
    own: list[AbstractContextManager[Any]] = [] if client.lock is None else [client.lock]
    own += [client._endpoint._lock, connection._lock, connection._socket._lock]
    slots = [transport._lock] if isinstance(transport, ProcessSlotTransport) else []
    return [*own, connections.selector.lock, *slots, connections._lock]


def slot_table_of(client: object) -> SlotTable:
    """The shared memory of the slots, as a client of :class:`ProcessSlotTransport` that has connected has mapped it."""
    connection = connection_of(client)
    assert connection is not None, "the client has not connected"
    table: SlotTable = connection._codec._table  # type: ignore[attr-defined]
    return table


def ignore_in_wait(selector: Selector, source: Source) -> None:
    """Let the thread in ``selector.wait`` sleep on where ``source`` is readable; ``poll`` still calls its handler."""
    with selector.lock:
        selector._selector.unregister(source)


# -- weights -----------------------------------------------------------------------------------------------


def channel_of(scheme: QueuedWeightSyncScheme, worker: int = 0) -> Channel:
    """The queues between a trainer and a worker."""
    return scheme._channels[worker]


def sender_of(scheme: QueuedWeightSyncScheme) -> Sender:
    """The sender of a trainer, with the handles of its workers and its pool of snapshots."""
    assert scheme._sender is not None, "the scheme has no sender in this process"
    return scheme._sender


def put_bytes(queue: DescriptorQueue, data: bytes) -> None:
    """Append bytes to a queue as they are, whether or not they are a pickle."""
    socket.send_fds(queue._writer, [data], [])


# -- collectors --------------------------------------------------------------------------------------------


def let_call_time_out(collector: AsyncBatchedCollector, seconds: float, group: int = 0) -> None:
    """Let the call that a group of environments waits for have begun so many seconds ago; no other call is late then.

    Of a call of which that was said already, the cancellation was as long ago.
    """
    coordinator = collector._coordinator
    assert coordinator is not None, "the collector does not run"
    with coordinator.lock:
        since = coordinator.block.watches[group].since
        known, cancelled_at = coordinator._late.get(group, (0.0, 0.0))
        if known == since[0]:
            coordinator._late[group] = known, cancelled_at - seconds
        else:
            since[0] -= seconds
    coordinator._pool.call_soon(lambda: None)  # it looks again then


def look_for_late_calls(collector: AsyncBatchedCollector, now: float) -> None:
    """Let a collector look for calls of environments that take too long, as it does from time to time.

    Args:
        collector: that runs, or starts.
        now: on the clock of ``time.monotonic``.
    """
    coordinator = collector._coordinator
    assert coordinator is not None, "the collector does not run"
    coordinator._tick(now)
