"""A connected pair of sockets that carries frames: from one process to another, and back.

A frame is a word of 64 bits, native byte order, and often nothing else::

    payload follows? (1 bit) | kind (3 bits) | exploration mode (4 bits) | number of the request (56 bits)

A payload is its length, a word too, and as many bytes, padded to whole words.
"""

from __future__ import annotations

import math
import os
import select
import socket
import struct
import threading
import weakref
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

__all__ = [
    "NUMBER",
    "PLAIN",
    "Frame",
    "FromClient",
    "FromServer",
    "Wire",
    "accept",
    "frame",
    "unix_socket",
    "wait_for_any",
    "word",
]

Frame: TypeAlias = tuple[int, bytes | None]
"""A word, and its payload if it has one."""

NUMBER = (1 << 56) - 1
"""The bits of a word that are the request's number."""
PLAIN = 1 << 60
"""Words below are requests, or replies, without a payload."""
_PAYLOAD = 1 << 63
_BUFFER_BYTES = 1 << 16


class FromClient(IntEnum):
    """What a client says."""

    REQUEST = 0
    PATIENT_REQUEST = 1
    """One that waits for room where the queue is full."""
    CANCEL = 2
    REFUSED = 3
    """A request was refused at the client: the server counts it."""
    JOIN = 4
    DESCRIBE = 5
    """Whoever dials wants to know what it takes to join."""


class FromServer(IntEnum):
    """What a server says."""

    REPLY = 0
    ERROR = 1
    WELCOME = 2


def word(kind: int, number: int = 0, mode: int = 0) -> int:
    """Put a word together."""
    return kind << 60 | mode << 56 | number


def frame(word: int, payload: bytes) -> bytes:
    """Put a frame with a payload together."""
    return struct.pack("=QQ", word | _PAYLOAD, len(payload)) + payload + bytes(-len(payload) % 8)


class Wire:
    """One end. Sending never blocks, and receiving only where that is asked for.

    Any thread may send; one at a time may receive. What a system call handed to the kernel before ``send`` returns is
    there for whoever has received it: so memory that was written before is read as it was written, on any processor.

    Args:
        sock: a connected stream socket, which belongs to the wire from now on; forked children don't have it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # what must not block says so itself
        self._sock = sock
        self._lock = threading.Lock()  # guards what follows
        self._unsent = bytearray()
        self._partial = bytearray()
        self._words = array("Q", bytes(_BUFFER_BYTES))
        self._buffer = memoryview(self._words).cast("B")
        _sockets.add(sock)
        weakref.finalize(self, sock.close)

    def fileno(self) -> int:
        return self._sock.fileno()

    # -- sending ---------------------------------------------------------------------------------------

    @property
    def half_read(self) -> bool:
        """Whether the beginning of a frame has arrived, and its end has not."""
        return bool(self._partial)

    @property
    def unsent(self) -> bool:
        """Whether something waits until the other end has read more; see :meth:`flush`."""
        return bool(self._unsent)

    def send(self, data: bytes) -> bool:
        """Send frames, or keep them until there is room; say whether all have left.

        Where the other end is gone, they are dropped.
        """
        with self._lock:
            if not self._unsent:
                sent = self._try(data)
                if sent == len(data):
                    return True
                data = data[sent:]
            self._unsent += data
            return False

    def send_descriptors(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Send frames and descriptors.

        Raises:
            BlockingIOError: there is no room; the other end has not read what came before.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))]
        with self._lock:
            if self._unsent:
                raise BlockingIOError
            try:
                sent = self._sock.sendmsg([data], rights, _DONT_WAIT)
            except BlockingIOError:
                raise
            except OSError:  # gone
                return
            self._unsent += data[sent:]

    def flush(self) -> None:
        """Send what was kept, as far as there is room."""
        with self._lock:
            del self._unsent[: self._try(self._unsent)]

    def _try(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data, _DONT_WAIT)
        except BlockingIOError:
            return 0
        except OSError:  # the other end is gone: so much for the data; who receives is told
            return len(data)

    def readable(self) -> bool:
        """Whether something has arrived, if only the other end's end."""
        return _poll([(self, select.POLLIN)], 0)

    def wait(self, timeout: float | None) -> bool:
        """Block until something has arrived, or there is room for what was kept, or ``timeout`` seconds passed."""
        return wait_for_any([self], timeout)

    def wait_for_room(self, timeout: float | None) -> bool:
        """Block until there is room for what was kept, or the other end is gone, or ``timeout`` seconds passed."""
        return _poll([(self, select.POLLOUT)], timeout)

    # -- receiving -------------------------------------------------------------------------------------

    def receive(self, *, block: bool = False) -> tuple[Sequence[int], Sequence[Frame]]:
        """Return what has arrived, if anything: requests or replies without payloads, as words; or else frames.

        Args:
            block: wait until something has arrived.

        Raises:
            EOFError: the other end is closed, or its process gone.
        """
        try:
            size = self._sock.recv_into(self._buffer, 0, 0 if block else _DONT_WAIT)
        except BlockingIOError:
            return (), ()
        except OSError as error:
            raise EOFError from error
        if size == 0:
            raise EOFError
        if size == 8 and not self._partial and self._words[0] < PLAIN:
            return self._words[:1], ()
        if size % 8 == 0 and not self._partial:
            words = self._words[: size // 8].tolist()
            if max(words) < PLAIN:
                return words, ()
        return (), self._parse(self._buffer[:size])

    def receive_descriptors(self, limit: int) -> tuple[Sequence[Frame], list[int]]:
        """Do as :meth:`receive`, and return the descriptors that came along."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _BUFFER_BYTES, limit, _RECEIVE_FLAGS | _DONT_WAIT)
        except BlockingIOError:
            return (), []
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return self._parse(memoryview(data)), descriptors

    def _parse(self, data: memoryview) -> Sequence[Frame]:
        partial = self._partial
        partial += data
        frames: list[Frame] = []
        position = 0
        while len(partial) - position >= 8:
            (word,) = _ONE.unpack_from(partial, position)
            if word < _PAYLOAD:
                frames.append((word, None))
                position += 8
                continue
            if len(partial) - position < 16:
                break
            (length,) = _ONE.unpack_from(partial, position + 8)
            end = position + 16 + length + -length % 8
            if end > len(partial):
                break
            frames.append((word & ~_PAYLOAD, bytes(partial[position + 16 : position + 16 + length])))
            position = end
        del partial[:position]
        return frames

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._sock.close()


def wait_for_any(wires: Sequence[Wire], timeout: float | None) -> bool:
    """Do as :meth:`Wire.wait`, for several of them."""
    return _poll([(wire, select.POLLIN | (select.POLLOUT if wire.unsent else 0)) for wire in wires], timeout)


def _poll(wires: Sequence[tuple[Wire, int]], timeout: float | None) -> bool:
    poll = select.poll()
    for wire, events in wires:
        poll.register(wire, events)
    return bool(poll.poll(None if timeout is None else min(math.ceil(timeout * 1000), 2**31 - 1)))


_DONT_WAIT = socket.MSG_DONTWAIT
_ONE = struct.Struct("=Q")
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

# A forked child must not hold its parent's sockets: nobody would see the parent's end of one closed.
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_forking = threading.Lock()  # held by a fork, and while a socket is made that it must know of


def unix_socket(descriptor: int | None = None) -> socket.socket:
    """Make a Unix stream socket, or take over a descriptor; forked children don't have it."""
    with _forking:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=descriptor)
        _sockets.add(sock)
    return sock


def accept(listener: socket.socket) -> socket.socket:
    """Accept a connection; forked children don't have it."""
    with _forking:
        sock, _ = listener.accept()
        _sockets.add(sock)
    return sock


def _close_all() -> None:
    _forking.release()
    for sock in list(_sockets):
        sock.close()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_all)
