"""The protocol between a server's process and its parent: its configuration, the commands, and the responses."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, Self

from aioinfer.devices import Model
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.transports.ipc.server import TransportHandoff

__all__ = ["Command", "Response", "ServerConfig", "SharedVersion"]


class Command(IntEnum):
    """Messages of the parent. Each has a number, and pickled arguments."""

    HEALTH = 0
    STATS = 1
    UPDATE = 2
    """The next snapshot of weights is in the queue."""
    SHUTDOWN = 3
    """It has no response: the process ends."""
    PAUSE = 4
    """The response comes when no forward pass runs any more."""
    RESUME = 5
    """End the pause with this command number, which may not have begun."""


class Response(IntEnum):
    """Messages of the process. A response has the number of its command."""

    RESULT = 0
    ERROR = 1
    READY = 2
    """The server has started."""
    FAILED = 3
    """The server can't start: the text of a traceback, and the pickled error or ``None``."""


class SharedVersion:
    """The version of the weights in use, in shared memory. The process writes it, and its parent reads it.

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
        """Set the version."""
        self._number[0] = version

    def read(self) -> int:
        """Return the version."""
        return self._number[0]

    def __getstate__(self) -> Any:
        return DupFd(self._segment.fd)

    def __setstate__(self, descriptor: Any) -> None:
        self._map(AnonymousSharedMemory(descriptor.detach(), 8, b""))


@dataclass(kw_only=True)
class ServerConfig:
    """The configuration of a server's process, which inherits it by fork, or unpickles it as it is spawned.

    The attributes are unpickled by :meth:`load`, and not while the process starts, so that the process can send an
    error to its parent.

    Attributes:
        policy_factory: makes the model.
        options: of the server.
        transports: the served transports.
        updates: the queue for snapshots of weights.
        version: where the process writes the version of the weights in use.
    """

    policy_factory: Callable[[], Model]
    options: Mapping[str, Any]
    transports: Sequence[TransportHandoff]
    updates: DescriptorQueue
    version: SharedVersion

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_pickled"}
        body = io.BytesIO()
        _TensorCopyingPickler(body).dump(state)
        # In shared memory: a start writes into a pipe, and would block for ever if the process died before it reads.
        self._pickled: Any = AnonymousSharedMemory.create(body.tell())
        self._pickled.write(body.getvalue(), 0)
        return {"_pickled": (DupFd(self._pickled.fd), body.tell())}

    def load(self) -> Self:
        """Set the attributes (in the process)."""
        pickled = self.__dict__.pop("_pickled", None)
        if pickled is not None:
            descriptor, size = pickled
            self.__dict__.update(pickle.loads(AnonymousSharedMemory(descriptor.detach(), size, b"").read(0, size)))
        return self


class _TensorCopyingPickler(ForkingPickler):
    """Pickles tensors by value.

    torch's own reduction shares the memory of a factory's tensors with a spawned process, which would then serve
    weights that were never published as soon as the trainer changes its own.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.dispatch_table = {
            kind: reduce
            for kind, reduce in self.dispatch_table.items()
            if kind.__module__.split(".")[0] not in ("torch", "tensordict")
        }
