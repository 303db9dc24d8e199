"""Where a server of other processes listens, and how they get there."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aioinfer.errors import ServerClosedError
from aioinfer.transports.wire import accept, unix_socket

__all__ = ["Listener", "check_peer", "delays", "dial", "tell", "try_to_connect"]

_BACKLOG = 4096
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
# Seconds until a server whose backlog is full is tried again: at first, and at most.
_DIAL_AGAIN = 0.01
_DIAL_SELDOM = 0.5


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
                sock.listen(_BACKLOG)
            else:
                if self._directory is not None:
                    os.makedirs(self._directory, mode=0o700, exist_ok=True)  # which only its owner may enter
                with _nobody_else_binds(self.address):
                    self._bind(sock)
                    sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._adopt(sock)

    def give_away(self) -> int:
        """Listen no more, and return a descriptor by which another process can go on."""
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
        """Take the next process in, of this user, that has dialled; ``None`` if there is none.

        Raises:
            OSError: no descriptor is left for it.
        """
        while self._socket is not None:
            try:
                sock = accept(self._socket)
            except (BlockingIOError, ConnectionAbortedError):
                return None
            try:
                check_peer(sock)
            except OSError:  # another user, or gone already
                sock.close()
            else:
                return sock
        return None

    def close(self) -> None:
        """Listen no more, until ``open``. Idempotent."""
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
    """What tells a socket's path from another one of the same name."""
    try:
        found = os.stat(address)
    except (OSError, ValueError):  # no path, or nothing there
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _nobody_else_binds(address: str) -> Iterator[None]:
    """Take turns with others that want the same path: who finds a socket there must know whether anybody listens."""
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
            try_to_connect(sock, address)
        except ServerClosedError:
            return False
        return True


def dial(address: str, timeout: float | None = None) -> socket.socket:
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
        for delay in delays():
            if try_to_connect(sock, address):
                break
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the server at {address} takes nobody in within {timeout} seconds")
            time.sleep(delay)
        check_peer(sock)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(True)
    return sock


def try_to_connect(sock: socket.socket, address: str) -> bool:
    """Connect to a listener without blocking; say whether it had room for us.

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


def delays() -> Iterator[float]:
    """Seconds to wait, for ever, between attempts to connect to a server whose backlog is full."""
    delay = _DIAL_AGAIN
    while True:
        yield delay
        delay = min(2 * delay, _DIAL_SELDOM)


def check_peer(sock: socket.socket) -> None:
    """Raise :class:`PermissionError` if the other end is of another user: abstract names have no permissions."""
    if not hasattr(socket, "SO_PEERCRED"):  # elsewhere the path's decide
        return
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.getuid():
        raise PermissionError("who is at the other end is another user")


def tell(address: str, data: bytes) -> None:
    """Connect, send ``data`` and hang up; nobody is told if that can't be. It does not block."""
    try:
        sock = unix_socket()
    except OSError:
        return

    def send() -> None:
        with sock:
            sock.sendall(data)

    def send_later() -> None:
        with suppress(OSError, ServerClosedError):
            for delay in delays():
                if try_to_connect(sock, address):
                    break
                time.sleep(delay)
            send()
        sock.close()

    try:
        if try_to_connect(sock, address):
            send()
        else:
            threading.Thread(target=send_later, name="aioinfer-connect", daemon=True).start()
    except (OSError, ServerClosedError):
        sock.close()


def _native(address: str) -> str:
    return "\0" + address[1:] if address.startswith("@") else address
