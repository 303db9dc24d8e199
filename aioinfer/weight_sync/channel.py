"""The channel between a trainer and one worker: two queues, and a connection that carries acknowledgements.

A worker opens an :class:`AckConnection` when it starts, and a new one when its trainer is gone. So a connection belongs
to one run of a worker and one run of a trainer: an acknowledgement never answers another trainer's snapshot, and EOF
means that the process at the other end has ended.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from aioinfer.errors import WeightSyncError, describe
from aioinfer.ipc.queue import Descriptor, DescriptorQueue

__all__ = [
    "Ack",
    "AckConnection",
    "AckKind",
    "Channel",
    "Handshake",
    "accept",
    "connect",
    "fork_lock",
    "make_message",
    "nack_reason",
    "parse_message",
]

_UPDATE = "update_weights"
_MAX_REASON = 2000  # characters
_LENGTH = 4  # bytes before each acknowledgement
_CHUNK = 1 << 16


@dataclass
class Channel:
    """The two queues of one worker, which outlive the trainer and the worker.

    A channel pickles for a process that starts, like a ``multiprocessing.Queue``.

    Attributes:
        updates: from the trainer, weights. It holds one message at most: the trainer takes unread ones back.
        handshakes: from the worker, one for each connection that it opens.
    """

    updates: DescriptorQueue = field(default_factory=DescriptorQueue)
    handshakes: DescriptorQueue = field(default_factory=DescriptorQueue)


def make_message(model_id: str, weights: Any) -> tuple[tuple[str, Any], str]:
    """Make a message for a weight queue."""
    return (model_id, weights), _UPDATE


def parse_message(message: Any) -> tuple[str, Any]:
    """Return the model id and the weights of a message; raise :class:`ValueError` if it is not one."""
    match message:
        case ((str() as model_id, weights), "update_weights"):
            return model_id, weights
        case (_, str() as kind):
            raise ValueError(f'expected "{_UPDATE}" on the weight queue, got "{kind}"')
    raise ValueError(f'expected ((model_id, weights), "{_UPDATE}") on the weight queue, got {message!r:.200}')


class AckKind(StrEnum):
    """The kinds of messages on an :class:`AckConnection`."""

    ACK = "ack"
    """The worker uses the snapshot."""
    SKIP = "skip"
    """The worker uses a newer one."""
    NACK = "nack"
    """The worker refuses the snapshot."""
    CONNECTED = "connected"
    """The trainer has accepted the connection."""
    DISCONNECT = "disconnect"
    """The worker shuts down."""


@dataclass(frozen=True, slots=True)
class Ack:
    """A message on an :class:`AckConnection`.

    Attributes:
        kind: of message.
        number: of the snapshot: the sender's id and a number; zero where the message is about none.
        reason: why the worker refuses the snapshot.
        aliased: whether the worker goes on reading the snapshot's memory until it acknowledges the next one.
    """

    kind: AckKind
    number: tuple[bytes, int] = (b"", 0)
    reason: str = ""
    aliased: bool = False


def nack_reason(error: BaseException) -> str:
    """Why weights are refused, for a process that may not have the class of the error."""
    reason = str(error) if isinstance(error, WeightSyncError) else describe(error)
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}..."


# A forked child must not hold copies of its parent's connections: the other ends would not get EOF.
_connections: weakref.WeakSet[AckConnection] = weakref.WeakSet()
fork_lock = threading.RLock()
"""Held by a fork, and while a connection is made that a forked child must close."""


class _Socket(socket.socket):
    """Closed with the last reference to it."""

    def __del__(self) -> None:
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)  # a child that is forked just now may keep a copy of the descriptor
        self.close()


class AckConnection:
    """One end of a stream of acknowledgements. No method blocks.

    Any thread may call ``send_ack`` and ``close``; one thread at a time may call ``receive``. A signal handler that
    raises neither tears a message nor loses one. The descriptor is closed with the last reference to the connection,
    so a waiting thread never waits for a descriptor that the process has given to another file.

    Args:
        descriptor: of a connected stream socket, which the connection owns from now on; forked children close it.
    """

    def __init__(self, descriptor: int) -> None:
        self._sock = _Socket(fileno=descriptor)
        self._sock.setblocking(False)
        self._received: list[bytes] = []
        _connections.add(self)

    def fileno(self) -> int:
        """The descriptor, which is readable when a message has come or the other end is gone."""
        return self._sock.fileno()

    def send_ack(self, ack: Ack) -> None:
        """Send a message. If the other end is gone nothing happens; if it reads too slowly the connection is closed."""
        body = pickle.dumps(ack)
        data = len(body).to_bytes(_LENGTH, "little") + body
        try:
            sent = self._sock.send(data) == len(data)
        except BlockingIOError:
            sent = False
        except ConnectionError:
            return
        if not sent:
            self.close()

    def receive(self, handle: Callable[[Ack], object]) -> None:
        """Call ``handle`` with each message that has come. A call that was interrupted is repeated by the next receive.

        Raises:
            EOFError: the other end is gone, and all of its messages were handled.
        """
        while True:
            data = b"".join(self._received)
            while (size := _LENGTH + int.from_bytes(data[:_LENGTH], "little")) <= len(data):
                handle(pickle.loads(data[_LENGTH:size]))
                data = data[size:]
                self._received = [data]
            try:
                self._received.extend(map(self._sock.recv, (_CHUNK,)))  # stored before a signal handler may raise
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise EOFError from error
            if not self._received[-1]:
                raise EOFError

    def close(self) -> None:
        """End the connection, for both ends. Idempotent."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _close_in_child() -> None:
    for connection in list(_connections):
        with suppress(OSError):
            connection._sock.close()
    fork_lock.release()


os.register_at_fork(before=fork_lock.acquire, after_in_parent=fork_lock.release, after_in_child=_close_in_child)


@dataclass(frozen=True, slots=True)
class Handshake:
    """The message by which a worker offers a connection.

    Attributes:
        connection: the trainer's end.
        pid: the worker's process.
        thread: the thread whose event loop receives; 0 if there is none.
    """

    connection: Descriptor
    pid: int
    thread: int


def connect(handshakes: DescriptorQueue, *, thread: int) -> AckConnection:
    """Open a connection, and leave the trainer's end in the queue (worker side)."""
    with fork_lock:
        with suppress(queue.Empty):
            while True:  # those of an earlier run of the worker, which no trainer has read
                with suppress(ValueError):
                    handshakes.unread(take=True)
        ours, theirs = socket.socketpair()
        connection = AckConnection(ours.detach())
        with theirs:
            handshakes.put(Handshake(Descriptor(theirs.fileno()), os.getpid(), thread))
    return connection


def accept(handshake: Handshake) -> AckConnection:
    """Take the trainer's end of a connection, whose worker may be gone by now (trainer side).

    Raises:
        OSError: there is no descriptor for it.
    """
    connection = AckConnection(os.dup(handshake.connection))
    connection.send_ack(Ack(AckKind.CONNECTED))
    return connection
