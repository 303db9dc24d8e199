"""A queue between two processes that no killed process can break."""

from __future__ import annotations

import errno
import io
import os
import pickle
import queue
import socket
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

__all__ = ["Descriptor", "DescriptorQueue"]

_MOST_BYTES = 2048  # what a datagram may carry on every platform
_MOST_DESCRIPTORS = 4


class Descriptor(int):
    """A file descriptor inside a message. The one that arrives is the receiver's own, to close."""


class DescriptorQueue:
    """A queue for small messages, one process puts and one gets. Its methods are those of ``multiprocessing.Queue``.

    It is a pair of connected datagram sockets. Against ``multiprocessing.Queue``: a message is written whole or not
    at all, so there is no lock that a killed process could keep; it is written by ``put`` itself, so there is no
    feeder thread that could hold up an exit; it may carry file descriptors; and the one who puts can take
    back with ``get_nowait`` what nobody has got yet.

    It is handed to other processes as they start, by fork or pickled.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._unblock()

    def _unblock(self) -> None:
        for end in (self._reader, self._writer):
            end.setblocking(False)
            end.set_inheritable(False)  # one that came from another process may be

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unblock()

    def put(self, message: Any) -> None:
        """Append a message, without blocking.

        Raises:
            queue.Full: too many wait already.
            ValueError: it is too long.
        """
        descriptors: list[int] = []
        body = io.BytesIO()
        _Pickler(body, descriptors).dump(message)
        data = body.getvalue()
        if len(data) > _MOST_BYTES:
            raise ValueError(f"a message may have {_MOST_BYTES} bytes, this one has {len(data)}")
        try:
            socket.send_fds(self._writer, [data], descriptors)
        except (BlockingIOError, InterruptedError):
            raise queue.Full from None
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise queue.Full from None
            raise

    def get_nowait(self) -> Any:
        """Take the first message.

        Raises:
            queue.Empty: there is none.
            ValueError: there was one that can't be unpickled.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self._reader, _MOST_BYTES, _MOST_DESCRIPTORS, _RECEIVE_FLAGS)
        except (BlockingIOError, InterruptedError):
            raise queue.Empty from None
        try:
            return _Unpickler(io.BytesIO(data), descriptors).load()
        except Exception as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ValueError(f"a message can't be unpickled: {type(error).__qualname__}: {error}") from error

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first message, waiting ``timeout`` seconds, or for ever, where there is none.

        Raises:
            queue.Empty: none came.
        """
        if block:
            wait([self._reader], timeout)
        return self.get_nowait()

    def fileno(self) -> int:
        """What is readable while messages are there."""
        return self._reader.fileno()

    def close(self) -> None:
        """Close this process's ends. Idempotent."""
        self._reader.close()
        self._writer.close()

    def __del__(self) -> None:
        if hasattr(self, "_writer"):
            self.close()


_NO_ROOM = {errno.ENOBUFS, errno.EAGAIN}
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class _Pickler(ForkingPickler):
    def __init__(self, file: io.BytesIO, descriptors: list[int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._descriptors = descriptors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Descriptor):
            return None
        self._descriptors.append(int(obj))
        return len(self._descriptors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, descriptors: list[int]) -> None:
        super().__init__(file)
        self._descriptors = descriptors

    def persistent_load(self, index: int) -> Descriptor:
        return Descriptor(self._descriptors[index])
