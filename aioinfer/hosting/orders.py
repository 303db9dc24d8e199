"""What a process is started with, and what it and its parent say to each other afterwards."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, NamedTuple

from aioinfer.devices import Model
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.transports.processes import GivenTransport

__all__ = ["FromChild", "FromParent", "Order", "Served", "VersionPage"]


class FromParent(IntEnum):
    """What the parent says: a command, its number, and its arguments."""

    HEALTH = 0
    STATS = 1
    UPDATE = 2
    """The weights lie on the queue."""
    SHUTDOWN = 3
    """It is answered by the end of the process."""
    PAUSE = 4
    """It is answered when no forward pass runs any more."""
    RESUME = 5
    """End the pause of this number, also one that has not begun."""


class FromChild(IntEnum):
    """What the process says."""

    ANSWER = 0
    ERROR = 1
    READY = 2
    """It serves."""
    FAILED = 3
    """It can't start: the text of a traceback, and the error if there is one that travels."""


class VersionPage:
    """Shared memory that says which weights the process serves. The process writes, its parent reads without asking.

    Args:
        version: of the weights that the model has at the start.
    """

    def __init__(self, version: int) -> None:
        self._map(AnonymousSharedMemory.create(8))
        self.write(version)

    def _map(self, segment: AnonymousSharedMemory) -> None:
        self._segment = segment
        self._number = segment.view.cast("q")

    def write(self, version: int) -> None:
        """Say that weights of this version are served."""
        self._number[0] = version

    def read(self) -> int:
        """The version of the weights that are served."""
        return self._number[0]

    def __getstate__(self) -> Any:
        return DupFd(self._segment.fd)

    def __setstate__(self, descriptor: Any) -> None:
        self._map(AnonymousSharedMemory(descriptor.detach(), 8, b""))


class Served(NamedTuple):
    """What a process serves, and how.

    Attributes:
        policy_factory: makes the model.
        options: of the server.
        transports: what is served.
        updates: where weights come.
        version: where the process says which weights it serves.
    """

    policy_factory: Callable[[], Model]
    options: Mapping[str, Any]
    transports: Sequence[GivenTransport]
    updates: DescriptorQueue
    version: VersionPage


class Order:
    """Hands a process what it is to serve. It is inherited by fork, or pickles as the process is spawned.

    It is unpickled by the process itself and not on its way there, so that the parent hears what goes wrong.

    Args:
        contents: what it hands over.
    """

    def __init__(self, contents: Served) -> None:
        self._contents: Served | None = contents
        self._pickled: Any = None

    def __getstate__(self) -> dict[str, Any]:
        body = io.BytesIO()
        _ByValue(body).dump(self._contents)
        # In shared memory: a start writes into a pipe, and would wait for ever for a process that died before it read.
        self._pickled = AnonymousSharedMemory.create(body.tell())
        self._pickled.write(body.getvalue(), 0)
        return {"_contents": None, "_pickled": (DupFd(self._pickled.fd), body.tell())}

    def opened(self) -> Served:
        """What the order is made of (the process)."""
        if self._contents is None:
            descriptor, size = self._pickled
            self._contents = pickle.loads(AnonymousSharedMemory(descriptor.detach(), size, b"").read(0, size))
        assert self._contents is not None
        return self._contents


class _ByValue(ForkingPickler):
    """Copies tensors.

    A process that is spawned would share the memory of a factory's tensors else: it would serve weights that nobody has
    published as soon as the trainer changes its own.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.dispatch_table = {
            kind: reduce
            for kind, reduce in self.dispatch_table.items()
            if kind.__module__.split(".")[0] not in ("torch", "tensordict")
        }
