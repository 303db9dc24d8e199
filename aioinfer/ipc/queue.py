"""A queue between two processes that no killed process can break."""

from __future__ import annotations

import errno
import io
import os
import pickle
import queue
import socket
import weakref
from array import array
from multiprocessing.reduction import ForkingPickler
from typing import Any

__all__ = ["Descriptor", "DescriptorQueue"]

_MOST_BYTES = 2048  # what a datagram may carry on every platform
_MOST_DESCRIPTORS = 4


class Descriptor(int):
    """A file descriptor inside a message. The one that arrives is the receiver's own, to close.

    It is -1 where the receiving process had no descriptor free.
    """


class DescriptorQueue:
    """A queue for small messages: one process puts, one gets. It never blocks.

    It is a pair of connected datagram sockets. Against ``multiprocessing.Queue``: a message is written whole or not
    at all, so there is no lock that a killed process could keep; it is written by ``put`` itself, so there is no
    feeder thread that could hold up an exit; it may carry file descriptors; and the one who puts can take
    back with ``get_nowait`` what nobody has got yet.

    It is handed to other processes as they start, by fork or pickled.

    One thread at a time may get. A signal handler that raises loses no message between ``peek`` and ``drop``. Python
    runs handlers only where something is called, has returned, or a loop turns; so what a system call returns is
    stored by C code that calls it.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._open()

    def _open(self) -> None:
        for end in (self._reader, self._writer):
            end.setblocking(False)
            end.set_inheritable(False)  # one that came from another process may be
            # In a reference cycle the sockets may be finalized before this is, and complain that they are open.
            weakref.finalize(self, end.close).atexit = False
        self._datagrams: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = []
        self._first: tuple[Any] | None = None  # the message of the first datagram

    def __getstate__(self) -> dict[str, Any]:
        return {"_reader": self._reader, "_writer": self._writer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

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
        except BlockingIOError:
            raise queue.Full from None
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise queue.Full from None
            raise

    def peek(self) -> Any:
        """Look at the first message; until ``drop``, it is the same object. Its descriptors stay the queue's own.

        Raises:
            queue.Empty: there is none.
            ValueError: there is one that can't be unpickled; ``drop`` forgets it.
        """
        if self._first is None:
            if not self._datagrams:
                self._receive()
            data, ancillary, _, _ = self._datagrams[0]
            self._first = (_unpickle(data, _descriptors(ancillary)),)
        return self._first[0]

    def drop(self) -> None:
        """Forget the message that ``peek`` found, and close its descriptors."""
        closing = map(os.close, _descriptors(self._datagrams[0][1]))
        self._first, self._datagrams = None, []
        list(closing)  # nothing is called in between, so they are closed once

    def get_nowait(self) -> Any:
        """Take the first message.

        Raises:
            queue.Empty: there is none.
            ValueError: there was one that can't be unpickled.
        """
        try:
            message = self.peek()
        except ValueError:
            self.drop()
            raise
        self._first, self._datagrams = None, []
        return message

    def unread(self, *, take: bool) -> Any:
        """Look at, or ``take`` back, the first message that nobody has got. It comes without its descriptors (-1).

        Raises:
            queue.Empty: there is none.
            ValueError: there is one that can't be unpickled.
        """
        try:
            return _unpickle(self._reader.recv(_MOST_BYTES, 0 if take else socket.MSG_PEEK), [])
        except BlockingIOError:
            raise queue.Empty from None

    def _receive(self) -> None:
        try:
            self._datagrams.extend(map(self._reader.recvmsg, (_MOST_BYTES,), (_ANCILLARY,), (_RECEIVE_FLAGS,)))
        except BlockingIOError:
            raise queue.Empty from None

    def fileno(self) -> int:
        """What is readable while messages are there."""
        return self._reader.fileno()

    def close(self) -> None:
        """Close this process's ends. Idempotent."""
        if self._datagrams:
            self.drop()
        self._reader.close()
        self._writer.close()

    def __del__(self) -> None:
        if hasattr(self, "_datagrams"):
            self.close()


_NO_ROOM = {errno.ENOBUFS, errno.EAGAIN}
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_ANCILLARY = socket.CMSG_LEN(_MOST_DESCRIPTORS * array("i").itemsize)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def _unpickle(data: bytes, descriptors: list[int]) -> Any:
    try:
        return _Unpickler(io.BytesIO(data), descriptors).load()
    except Exception as error:
        try:
            _Unpickler(io.BytesIO(data), descriptors).load()
        except Exception:
            raise ValueError(f"a message can't be unpickled: {type(error).__qualname__}: {error}") from error
        raise  # out of a signal handler, and not for the message


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
        return Descriptor(self._descriptors[index] if index < len(self._descriptors) else -1)
