"""What a client process and its server say to each other, and the page that tells clients of the server's state."""

from __future__ import annotations

from enum import IntEnum

from aioinfer.errors import InferenceError, ServerClosedError, ServerPausedError
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.pickling import dump_exception, load_exception
from aioinfer.modes import long_lived

__all__ = ["ANSWERED", "CLIENT_INDEX", "REFUSED", "FromClient", "FromServer", "State", "StatusPage"]

CLIENT_INDEX = (1 << 32) - 1
"""The bits of a request's number that say which client of its process made it."""


REFUSED, ANSWERED = 0, 1


class FromClient(IntEnum):
    """Messages of a client process."""

    REQUEST = 0
    REQUEST_WAIT = 1
    """A request that waits for space where the queue is full."""
    CANCEL = 2
    SETTLED_LOCALLY = 3
    """A request ended in the client process: the server counts it. The number is ``REFUSED`` or ``ANSWERED``."""
    HELLO = 4
    DESCRIBE = 5
    """Asks for an endpoint, from which a separately started process can make clients."""
    RELEASE = 6
    """Clients that were never used were closed: no process will say hello for them."""


class FromServer(IntEnum):
    """Messages of a server."""

    REPLY = 0
    ERROR = 1
    HELLO_ACK = 2


class State(IntEnum):
    """Whether requests are taken."""

    OPEN = 0
    PAUSED = 1
    CLOSED = 2
    """None is taken; what was sent is still read, and answered."""
    ENDED = 3
    """Nothing is read any more."""


_BYTES = 4096
_KEY, _ERROR = 16, 512  # where each begins: a length of two bytes, then the text


class StatusPage:
    """A page of shared memory. The server's process writes it, client processes read it.

    A client looks at the state before it sends a request, and again afterwards. The server changes the state first and
    then reads what has been sent. So either the server finds the request, or the client the new state: the two
    system calls are ordered by the socket that they are about, whatever the processor does. A client that finds
    ``PAUSED`` or ``ENDED`` fails its request itself. So does a client that reads only then that it was accepted: it
    can't tell whether the server has read its first requests, and may fail one whose forward pass is under way.

    Args:
        memory: the page, in another process than the one that made it.
    """

    @long_lived()
    def __init__(self, memory: AnonymousSharedMemory | None = None) -> None:
        self.memory = AnonymousSharedMemory.create(_BYTES) if memory is None else memory
        self.view = self.memory.view
        """Its first byte is the state, its second counts how often the version's key was set, its third how often the
        server was closed."""
        self._known = 0, ""
        self.closings_seen = self.view[2]
        """How often the server had been closed when it last said something to this client."""

    @classmethod
    @long_lived()
    def opened(cls, descriptor: int) -> StatusPage:
        """Map a page of another process; the descriptor is its own from now on."""
        return cls(AnonymousSharedMemory(descriptor, _BYTES, b""))

    def set_state(self, state: State, error: InferenceError | None = None) -> None:
        """Say whether requests are taken, and why not."""
        if error is not None:
            self._write(_ERROR, dump_exception(error))
        if state >= State.CLOSED > self.view[0]:
            self.view[2] = (self.view[2] + 1) % 256
        self.view[0] = state

    @property
    def has_closed(self) -> bool:
        """Whether the server was closed since it last said something to this client, if only to be opened again."""
        return self.view[0] >= State.CLOSED or self.view[2] != self.closings_seen

    def set_version_key(self, key: str | None) -> None:
        """Say which entry of a reply has the version of the weights."""
        self._write(_KEY, (key or "").encode())
        self.view[1] = (self.view[1] + 1) % 256

    def version_key(self) -> str:
        """The entry of a reply that has the version; empty if none does."""
        if self.view[1] != self._known[0]:
            self._known = self.view[1], self._read(_KEY).decode()
        return self._known[1]

    def refusal(self, state: int) -> Exception:
        """The error for a request that is not taken in this state, whatever it is by now."""
        if state == State.PAUSED:
            return ServerPausedError("the server is paused; try again when it goes on")
        try:
            return load_exception(self._read(_ERROR))
        except Exception:  # too long for the page
            return ServerClosedError("the server is shut down")

    def _write(self, at: int, data: bytes) -> None:
        space = (_ERROR if at == _KEY else _BYTES) - at - 2
        data = data if len(data) <= space else b""
        self.view[at : at + 2] = len(data).to_bytes(2, "little")
        self.view[at + 2 : at + 2 + len(data)] = data

    def _read(self, at: int) -> bytes:
        size = int.from_bytes(self.view[at : at + 2], "little")
        return bytes(self.view[at + 2 : at + 2 + size])
