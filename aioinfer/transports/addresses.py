"""Where a server of other processes listens, and how they get there."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import struct
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from aioinfer.errors import ServerClosedError
from aioinfer.transports.wire import accept, unix_socket

__all__ = ["Listener", "dial"]

_BACKLOG = 4096
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


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
        self._closing = weakref.finalize(self, _close, sock, self.address, self._directory, os.getpid())

    def _bind(self, sock: socket.socket) -> None:
        if self.address.startswith("@"):
            sock.bind(_native(self.address))
            return
        if self._directory is not None:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)  # which only its owner may enter
        try:
            sock.bind(self.address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not stat.S_ISSOCK(os.stat(self.address).st_mode):
                raise
            with suppress(ServerClosedError):
                dial(self.address).close()
                raise  # somebody listens there
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
            if _is_of_this_user(sock):
                return sock
            sock.close()
        return None

    def close(self) -> None:
        """Listen no more, until ``open``. Idempotent."""
        if self._socket is not None:
            self._socket = None
            self._closing()


def _close(sock: socket.socket, address: str, directory: str | None, pid: int) -> None:
    sock.close()
    if not address.startswith("@") and pid == os.getpid():  # not in a forked child, whose parent still listens
        with suppress(OSError):
            os.unlink(address)
            if directory is not None:
                os.rmdir(directory)


def dial(address: str) -> socket.socket:
    """Connect to a listener.

    Raises:
        ServerClosedError: nobody listens there.
        PermissionError: somebody else does, another user.
    """
    sock = unix_socket()
    try:
        sock.connect(_native(address))
    except OSError as error:
        sock.close()
        raise ServerClosedError(f"no server listens at {address}: it is shut down, or its process is gone") from error
    if not _is_of_this_user(sock):
        sock.close()
        raise PermissionError(f"who listens at {address} is another user")
    return sock


def _native(address: str) -> str:
    return "\0" + address[1:] if address.startswith("@") else address


def _is_of_this_user(sock: socket.socket) -> bool:
    """Whether the other end is: abstract names have no permissions. Elsewhere the path's decide."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(uid == os.getuid())
