"""Unix sockets: framed ones that connect two processes, and the address where a server listens.

A frame is a header of 64 bits, native byte order, and often nothing else::

    payload follows? (1 bit) | kind (3 bits) | mode (4 bits) | number of the request (56 bits)

Where requests lie in slots, a mode takes 3 bits, and the bit above it says whether the request has a dimension of rows.

A payload is its length, 64 bits too, and as many bytes, padded to whole words.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import secrets
import select
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from aioinfer.errors import ServerClosedError

__all__ = [
    "NUMBER",
    "PLAIN",
    "Frame",
    "FramedSocket",
    "Listener",
    "Rest",
    "accept",
    "check_same_user",
    "connect_delays",
    "connect_unix",
    "frame",
    "header",
    "send_once",
    "try_connect",
    "unix_socket",
    "wait_for_any",
]

Frame: TypeAlias = tuple[int, bytes | None]
"""A word, and its payload if it has one."""

Rest: TypeAlias = tuple[list[Any], bytearray, int]
"""Received data that was not handed out; see :attr:`FramedSocket.inbox`."""

NUMBER = (1 << 56) - 1
"""The bits of a word that are the request's number."""
PLAIN = 1 << 60
"""Words below are requests, or replies, without a payload."""
_PAYLOAD = 1 << 63
BUFFER_BYTES = 1 << 16
"""What is received with one system call, at most."""
# A socket takes so many bytes at once, or none: the kernel does not split less than half of its buffer.
_WHOLE_BYTES = 1 << 15


def header(kind: int, number: int = 0, mode: int = 0) -> int:
    """Put a word together."""
    return kind << 60 | mode << 56 | number


def frame(header: int, payload: bytes) -> bytes:
    """Put a frame with a payload together."""
    return struct.pack("=QQ", header | _PAYLOAD, len(payload)) + payload + bytes(-len(payload) % 8)


class FramedSocket:
    """One end of a connection that carries frames. Sending never blocks, and receiving only where that is asked for.

    Any thread may send; one at a time may receive. The kernel has the data when ``send`` returns, and hands it to the
    receiver later: so memory that was written before a frame is read as it was written, on any processor.

    A thread may be interrupted anywhere by an exception of a signal handler. So the effect of a system call is noted
    by the same call of C code (``list.extend`` over ``map``), and nothing is done twice or lost afterwards.

    Args:
        sock: a stream socket, which belongs to this object from now on; forked children don't have it. It is
            connected before anything is sent.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # what must not block says so itself
        self._sock = sock
        self._lock = threading.Lock()  # guards what is unsent
        self.outbox: deque[tuple[bytes, list[int]]] = deque()
        """Frames that wait until the other end has read more, see :meth:`flush`, and the sent bytes of each."""
        self._words = array("Q", bytes(BUFFER_BYTES))
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
    def has_partial_frame(self) -> bool:
        """Whether the beginning of a frame has arrived, and its end has not."""
        return self.inbox[2] > 0

    @property
    def unsent(self) -> bool:
        """Whether something waits until the other end has read more; see :meth:`flush`."""
        return bool(self.outbox)

    def send(self, data: bytes) -> bool:
        """Send frames, or keep them until there is room; return whether all were sent.

        If the other end is gone, they are dropped.
        """
        with self._lock:
            if not self.outbox and len(data) <= _WHOLE_BYTES:  # so much is sent whole, or not at all
                try:
                    sent = self._sock.send(data, _DONT_WAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:  # the other end is gone: the thread that receives is told
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

    def wait_writable(self, timeout: float | None) -> bool:
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
        """Do as :meth:`receive`, but return the same again until it is confirmed by a change of ``inbox``.

        Args:
            block: wait until something has arrived, or for as long as :meth:`set_receive_timeout` says.

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

    def set_receive_timeout(self, seconds: float) -> None:
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
            (header,) = _ONE.unpack_from(partial, position)
            if header < _PAYLOAD:
                frames.append((header, None))
                position += 8
                continue
            if len(partial) - position < 16:
                break
            (length,) = _ONE.unpack_from(partial, position + 8)
            end = position + 16 + length + -length % 8
            if end > len(partial):
                break
            frames.append((header & ~_PAYLOAD, bytes(partial[position + 16 : position + 16 + length])))
            position = end
        left = partial[position:] if position else partial
        return frames, ([], left, len(left))

    def shutdown(self) -> None:
        """Disconnect, but keep the descriptor: a thread that waits for data finds EOF."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is not connected, or was closed
            pass

    def close(self) -> None:
        """Disconnect. Idempotent."""
        self._sock.close()


def wait_for_any(sockets: Sequence[FramedSocket], timeout: float | None) -> bool:
    """Do as :meth:`FramedSocket.wait`, for several of them."""
    return _poll([(sock, select.POLLIN | (select.POLLOUT if sock.unsent else 0)) for sock in sockets], timeout)


def _poll(sockets: Sequence[tuple[FramedSocket, int]], timeout: float | None) -> bool:
    poll = select.poll()
    for sock, events in sockets:
        if (descriptor := sock.fileno()) < 0:  # closed: there is nothing to wait for
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


BACKLOG = 4096
"""How many connections may wait until they are accepted."""
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
# Seconds until a server whose backlog is full is tried again: at first, and at most.
_FIRST_DELAY = 0.01
_LONGEST_DELAY = 0.5


class Listener:
    """A Unix socket that listens.

    Attributes:
        address: a path; or, for one that was not named and where Linux has them, a name in the abstract namespace,
            written with a leading ``@``: nothing of it is left when the process is gone, however it ends.

    Args:
        address: a path to listen at; ``None`` makes an address up.
        descriptor: of a socket that listens there already; its own from now on.

    Raises:
        OSError: somebody else listens there, or the path can't be made.
    """

    def __init__(self, address: str | None = None, descriptor: int | None = None) -> None:
        self._directory: str | None = None
        if address is None and sys.platform == "linux":
            address = f"@aioinfer-{secrets.token_hex(12)}"
        elif address is None:
            self._directory = tempfile.mkdtemp(prefix="aioinfer-")
            address = str(Path(self._directory) / "server")
        self.address = address
        self._socket: socket.socket | None = None
        if descriptor is None:
            self.open()
        else:
            self._adopt(unix_socket(descriptor))

    def open(self) -> None:
        """Listen, if it does not already."""
        if self._socket is not None:
            return
        sock = unix_socket()
        try:
            if self.address.startswith("@"):
                sock.bind(_native(self.address))
                sock.listen(BACKLOG)
            else:
                if self._directory is not None:
                    os.makedirs(self._directory, mode=0o700, exist_ok=True)  # which only its owner may enter
                with _nobody_else_binds(self.address):
                    self._bind(sock)
                    sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._adopt(sock)

    def detach(self) -> int:
        """Stop listening, and return a descriptor by which another process can go on."""
        descriptor = os.dup(self.fileno())
        self._closing.detach()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        return descriptor

    def _adopt(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.set_inheritable(False)  # one that came from another process may be
        self._socket = sock
        self._closing = weakref.finalize(
            self, _close, sock, self.address, _identity(self.address), self._directory, os.getpid()
        )

    def _bind(self, sock: socket.socket) -> None:
        try:
            sock.bind(self.address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not stat.S_ISSOCK(os.stat(self.address).st_mode):
                raise
            if _somebody_listens(self.address):
                raise
            os.unlink(self.address)  # left by a process that was killed
            sock.bind(self.address)
        os.chmod(self.address, 0o600)

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def is_open(self) -> bool:
        """Whether it listens."""
        return self._socket is not None

    def accept(self) -> socket.socket | None:
        """Accept the next connection of a process of this user; ``None`` if there is none.

        Raises:
            OSError: no descriptor is left for it.
        """
        while self._socket is not None:
            try:
                sock = accept(self._socket)
            except (BlockingIOError, ConnectionAbortedError):
                return None
            try:
                check_same_user(sock)
            except OSError:  # another user, or gone already
                sock.close()
            else:
                return sock
        return None

    def close(self) -> None:
        """Stop listening, until ``open``. Idempotent."""
        if self._socket is not None:
            self._socket = None
            self._closing()


def _close(
    sock: socket.socket, address: str, identity: tuple[int, int] | None, directory: str | None, pid: int
) -> None:
    if identity is not None and pid == os.getpid():  # not in a forked child, whose parent still listens
        with suppress(OSError):
            if _identity(address) == identity:  # while we listen nobody replaces it
                os.unlink(address)
            if directory is not None:
                os.rmdir(directory)
    sock.close()


def _identity(address: str) -> tuple[int, int] | None:
    """The device and inode of a path, which tell a socket from another one of the same name."""
    try:
        found = os.stat(address)
    except (OSError, ValueError):  # no path, or nothing there
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _nobody_else_binds(address: str) -> Iterator[None]:
    """Lock a path against other processes that bind it: a process that finds a socket there must know its state."""
    path = f"{address}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            found = os.fstat(descriptor)
            if _identity(path) != (found.st_dev, found.st_ino):  # who had it before has removed it
                continue
            try:
                yield
            finally:
                os.unlink(path)
            return
        finally:
            os.close(descriptor)


def _somebody_listens(address: str) -> bool:
    with unix_socket() as sock:
        try:
            try_connect(sock, address)
        except ServerClosedError:
            return False
        return True


def connect_unix(address: str, timeout: float | None = None) -> socket.socket:
    """Connect to a listener.

    Args:
        address: where it listens.
        timeout: seconds to wait where its backlog is full; ``None`` waits for ever.

    Raises:
        ServerClosedError: nobody listens there.
        PermissionError: somebody else does, another user.
        TimeoutError: its backlog is still full.
        OSError: no descriptor is left.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    sock = unix_socket()
    try:
        for delay in connect_delays():
            if try_connect(sock, address):
                break
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the server at {address} accepts no connection within {timeout} seconds")
            time.sleep(delay)
        check_same_user(sock)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(True)
    return sock


def try_connect(sock: socket.socket, address: str) -> bool:
    """Connect to a listener without blocking; return whether its backlog had room.

    Raises:
        ServerClosedError: nobody listens there.
    """
    sock.setblocking(False)
    try:
        sock.connect(_native(address))
    except BlockingIOError:
        return False
    except OSError as error:
        raise ServerClosedError(f"no server listens at {address}: it is shut down, or its process is gone") from error
    sock.setblocking(True)
    return True


def connect_delays() -> Iterator[float]:
    """Seconds to wait, for ever, between attempts to connect to a server whose backlog is full."""
    delay = _FIRST_DELAY
    while True:
        yield delay
        delay = min(2 * delay, _LONGEST_DELAY)


def check_same_user(sock: socket.socket) -> None:
    """Raise :class:`PermissionError` if the other end is of another user: abstract names have no permissions."""
    if not hasattr(socket, "SO_PEERCRED"):  # elsewhere the path's decide
        return
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.getuid():
        raise PermissionError("the process at the other end is of another user")


def send_once(address: str, data: bytes) -> None:
    """Connect, send ``data`` and disconnect, without blocking; no error is reported."""
    try:
        sock = unix_socket()
    except OSError:
        return

    def send() -> None:
        with sock:
            sock.sendall(data)

    def send_later() -> None:
        with suppress(OSError, ServerClosedError):
            for delay in connect_delays():
                if try_connect(sock, address):
                    break
                time.sleep(delay)
            send()
        sock.close()

    try:
        if try_connect(sock, address):
            send()
        else:
            threading.Thread(target=send_later, name="aioinfer-connect", daemon=True).start()
    except (OSError, ServerClosedError):
        sock.close()


def _native(address: str) -> str:
    return "\0" + address[1:] if address.startswith("@") else address
