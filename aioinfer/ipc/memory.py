"""Memory that processes share and that has no name: nothing of it is left when they are gone, however they end."""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile

import torch
from torch import Tensor

from aioinfer.modes import long_lived

__all__ = ["AnonymousSharedMemory"]


class AnonymousSharedMemory:
    """A piece of shared memory, reached by a file descriptor that travels to other processes.

    There is no entry in ``/dev/shm`` to be removed: the kernel frees the memory with the last descriptor
    and the last mapping.

    Attributes:
        id: the same in every process.
        view: its bytes.
        memory: the same as a tensor, ``[nbytes]``. Tensors that are views of it keep the mapping alive.
    """

    def __init__(self, fd: int, nbytes: int, segment_id: bytes) -> None:
        self.fd = fd
        self.id = segment_id
        self.view = memoryview(mmap.mmap(fd, nbytes))
        with long_lived():
            self.memory: Tensor = torch.frombuffer(self.view, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> AnonymousSharedMemory:
        """Make a new one; at least one byte."""
        fd = _anonymous_file()
        try:
            os.ftruncate(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, nbytes, secrets.token_bytes(8))

    def __len__(self) -> int:
        return len(self.memory)

    def write(self, data: bytes, at: int) -> None:
        """Copy ``data`` to byte ``at``."""
        self.view[at : at + len(data)] = data

    def read(self, at: int, size: int) -> bytes:
        """Copy ``size`` bytes from byte ``at``."""
        return bytes(self.view[at : at + size])

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("aioinfer")
    with tempfile.TemporaryFile() as file:  # unlinked at once, where that is how the platform does it
        return os.dup(file.fileno())
