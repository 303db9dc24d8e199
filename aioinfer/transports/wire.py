"""A connected pair of sockets that carries frames: from one process to another, and back.

A frame is a word of 64 bits, native byte order, and often nothing else::

    payload follows? (1 bit) | kind (3 bits) | exploration mode (4 bits) | number of the request (56 bits)

A payload is its length, a word too, and as many bytes, padded to whole words.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import struct
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, TypeAlias

__all__ = [
    "NUMBER",
    "PLAIN",
    "Frame",
    "FromClient",
    "FromServer",
    "Rest",
    "Wire",
    "accept",
    "frame",
    "unix_socket",
    "wait_for_any",
    "word",
]

Frame: TypeAlias = tuple[int, bytes | None]
"""A word, and its payload if it has one."""

Rest: TypeAlias = tuple[list[Any], bytearray, int]
"""What a wire has received and not handed out; see :attr:`Wire.inbox`."""

NUMBER = (1 << 56) - 1
"""The bits of a word that are the request's number."""
PLAIN = 1 << 60
"""Words below are requests, or replies, without a payload."""
_PAYLOAD = 1 << 63
_BUFFER_BYTES = 1 << 16
# A socket takes so many bytes at once, or none: the kernel does not split less than half of its buffer.
_WHOLE_BYTES = 1 << 15


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
    RELEASE = 6
    """Clients that were never used were closed: nobody will join for them."""


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

    A thread may be interrupted anywhere by an exception of a signal's handler. So what a system call has done is noted
    by the same call of C code (``list.extend`` over ``map``), and nothing is done twice or forgotten afterwards.

    Args:
        sock: a stream socket, which belongs to the wire from now on; forked children don't have it. It is connected
            before anything is sent.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # what must not block says so itself
        self._sock = sock
        self._lock = threading.Lock()  # guards what is unsent
        self.outbox: deque[tuple[bytes, list[int]]] = deque()
        """What waits until the other end has read more, see :meth:`flush`: frames, and how many bytes left when."""
        self._words = array("Q", bytes(_BUFFER_BYTES))
        self._buffer = memoryview(self._words).cast("B")
        self.inbox: Rest = [], bytearray(), 0
        """What was received and not confirmed, once at most; the frame that has begun before; its confirmed bytes."""
        self._receive: Callable[[int], Any] = partial(sock.recv_into, self._buffer, 0)
        self._receive_message: Callable[[int], Any] = partial(sock.recvmsg_into, [self._buffer], _DESCRIPTOR_BYTES)
        _sockets.add(sock)
        weakref.finalize(self, sock.close)

    def fileno(self) -> int:
        return self._sock.fileno()

    # -- sending ---------------------------------------------------------------------------------------

    @property
    def half_read(self) -> bool:
        """Whether the beginning of a frame has arrived, and its end has not."""
        return self.inbox[2] > 0

    @property
    def unsent(self) -> bool:
        """Whether something waits until the other end has read more; see :meth:`flush`."""
        return bool(self.outbox)

    def send(self, data: bytes) -> bool:
        """Send frames, or keep them until there is room; say whether all have left.

        Where the other end is gone, they are dropped.
        """
        with self._lock:
            if not self.outbox and len(data) <= _WHOLE_BYTES:  # such a frame leaves whole, or not at all
                try:
                    sent = self._sock.send(data, _DONT_WAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:  # the other end is gone: so much for the data; who receives is told
                    return True
                if sent == len(data):
                    return True
                data = data[sent:]
            self.outbox.append((data, []))
            self._flush()
            return not self.outbox

    def send_descriptors(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Send frames and descriptors.

        Raises:
            BlockingIOError: there is no room; the other end has not read what came before.
            OSError: it is gone, or can't be sent any.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))]
        with self._lock:
            if self.outbox:
                raise BlockingIOError
            sent = self._sock.sendmsg([data], rights, _DONT_WAIT)
            if sent < len(data):
                self.outbox.append((data[sent:], []))

    def flush(self) -> None:
        """Send what was kept, as far as there is room."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        while self.outbox:
            data, sent = self.outbox[0]
            done = sum(sent)
            if done == len(data):
                self.outbox.popleft()
                continue
            try:
                sent.extend(map(self._sock.send, (memoryview(data)[done:],), _NOW))
            except BlockingIOError:
                return
            except OSError:
                self.outbox.clear()

    def readable(self) -> bool:
        """Whether something has arrived, if only the other end's end."""
        return bool(self.inbox[0]) or _poll([(self, select.POLLIN)], 0)

    def wait(self, timeout: float | None) -> bool:
        """Block until something has arrived, or there is room for what was kept, or ``timeout`` seconds passed."""
        return bool(self.inbox[0]) or wait_for_any([self], timeout)

    def wait_for_room(self, timeout: float | None) -> bool:
        """Block until there is room for what was kept, or the other end is gone, or ``timeout`` seconds passed."""
        return _poll([(self, select.POLLOUT)], timeout)

    # -- receiving -------------------------------------------------------------------------------------

    def receive(self) -> tuple[Sequence[int], Sequence[Frame]]:
        """Return what has arrived, if anything: requests or replies without payloads, as words; or else frames.

        Raises:
            EOFError: the other end is closed, or its process gone.
        """
        words, frames, rest = self.peek()
        if rest is None:
            self.inbox[0].clear()
        else:
            self.inbox = rest
        return words, frames

    def peek(self, block: bool = False) -> tuple[Sequence[int], Sequence[Frame], Rest | None]:
        """Do as :meth:`receive`, but return the same again until it is confirmed, by a change of ``inbox``.

        Args:
            block: wait until something has arrived, or for as long as :meth:`look_up` says.

        Returns:
            Words, and ``None``: ``inbox[0].clear()`` confirms them; or frames, and what ``inbox`` is to be then.
        """
        received, _, begun = self.inbox
        if not received:
            try:
                received.extend(map(self._receive, _FOR_EVER if block else _NOW))
            except BlockingIOError:
                return (), (), None
            except OSError as error:
                raise EOFError from error
        size = received[0]
        if size == 8 and not begun and self._words[0] < PLAIN:
            return self._words[:1], (), None
        if type(size) is tuple:  # of `peek_descriptors`
            size = size[0]
        if size == 0:
            raise EOFError
        if size % 8 == 0 and not begun:
            words = self._words[: size // 8].tolist()
            if max(words) < PLAIN:
                return words, (), None
        return (), *self._parse(size)

    def peek_descriptors(self, descriptors: dict[int, None]) -> tuple[Sequence[Frame], Rest | None]:
        """Do as :meth:`peek`, and add the descriptors that came along.

        Args:
            descriptors: gets them as keys; the caller closes them, also where this raises.

        Raises:
            OSError: there were more of them than this process may have.
        """
        received = self.inbox[0]
        if not received:
            try:
                received.extend(map(self._receive_message, _RECEIVE_NOW))
            except BlockingIOError:
                return (), None
            except OSError as error:
                raise EOFError from error
        size, messages, flags, _ = received[0]
        for level, kind, data in messages:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array("i")
                rights.frombytes(data[: len(data) - len(data) % rights.itemsize])
                for descriptor in rights:
                    descriptors[descriptor] = None
                    os.set_inheritable(descriptor, False)
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "no file descriptor is left for what the server shares; raise `ulimit -n`")
        if size == 0:
            raise EOFError
        return self._parse(size)

    def look_up(self, seconds: float) -> None:
        """Let a :meth:`peek` that blocks return so often, also if nothing has arrived."""
        whole = int(seconds)
        timeout = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)

    def _parse(self, size: int) -> tuple[Sequence[Frame], Rest]:
        _, partial, kept = self.inbox
        partial[kept:] = self._buffer[:size]
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
        left = partial[position:] if position else partial
        return frames, ([], left, len(left))

    def shut_down(self) -> None:
        """Hang up, but keep the descriptor: whoever waits for something to arrive sees the end of it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is not connected, or was closed
            pass

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._sock.close()


def wait_for_any(wires: Sequence[Wire], timeout: float | None) -> bool:
    """Do as :meth:`Wire.wait`, for several of them."""
    return _poll([(wire, select.POLLIN | (select.POLLOUT if wire.unsent else 0)) for wire in wires], timeout)


def _poll(wires: Sequence[tuple[Wire, int]], timeout: float | None) -> bool:
    poll = select.poll()
    for wire, events in wires:
        if (descriptor := wire.fileno()) < 0:  # closed: there is nothing to wait for
            return True
        poll.register(descriptor, events)
    return bool(poll.poll(None if timeout is None else min(math.ceil(timeout * 1000), 2**31 - 1)))


_DONT_WAIT = socket.MSG_DONTWAIT
_NOW = (_DONT_WAIT,)
_RECEIVE_NOW = (_DONT_WAIT | getattr(socket, "MSG_CMSG_CLOEXEC", 0),)
_FOR_EVER = (0,)
_DESCRIPTOR_BYTES = socket.CMSG_SPACE(4 * array("i").itemsize)
_ONE = struct.Struct("=Q")

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
