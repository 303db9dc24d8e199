"""Snapshots of weights in shared memory: the trainer writes them, the workers read them in place."""

from __future__ import annotations

import errno
import os
import pickle
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, count

import torch
from torch import Tensor

from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.queue import Descriptor
from aioinfer.modes import long_lived
from aioinfer.weight_sync.weights import Weights

__all__ = [
    "Layout",
    "SnapshotBuffer",
    "SnapshotPool",
    "SnapshotReader",
    "SnapshotRef",
    "clone_tensors",
    "copy_tensors",
]

_ALIGNMENT = 64  # bytes; a cache line, and enough for every dtype
_PAGE = 65536  # bytes; buffers are multiples of it, so that extra states may grow
_MAX_MAPPED = 4  # buffers that a reader keeps mapped; a trainer alternates between three at most


Description = tuple[tuple[str, ...], tuple[torch.dtype, ...], tuple[torch.Size, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """The position of each tensor in a buffer.

    Attributes:
        entries: name, dtype, shape and first byte of each tensor. Tensors that share memory in the source, as tied
            parameters do, share it here.
        nbytes: of all tensors together.
        id: the same in every process that has this layout.
        pickled: the layout for other processes.
    """

    entries: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    nbytes: int
    id: bytes
    pickled: bytes = field(repr=False)

    @classmethod
    def of(cls, description: Description) -> Layout:
        """Lay out tensors that :func:`_describe` has described."""
        sizes = [
            _aligned(dtype.itemsize * shape.numel()) if owner == index else 0
            for index, (_, dtype, shape, owner) in enumerate(zip(*description, strict=True))
        ]
        starts = [0, *accumulate(sizes)]
        entries = tuple(
            (name, dtype, tuple(shape), starts[owner]) for name, dtype, shape, owner in zip(*description, strict=True)
        )
        return cls.unpickle(pickle.dumps((entries, starts[-1], secrets.token_bytes(8))))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Lay out tensors."""
        return cls.of(_describe(tensors))

    @classmethod
    def unpickle(cls, pickled: bytes) -> Layout:
        """Make the layout that another process has pickled."""
        entries, nbytes, layout_id = pickle.loads(pickled)
        return cls(entries, nbytes, layout_id, pickled)

    @long_lived()
    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in ``memory``, ``[nbytes]`` of ``uint8``, by name."""
        return {
            name: memory[offset : offset + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
            for name, dtype, shape, offset in self.entries
        }


def _describe(tensors: Mapping[str, Tensor]) -> Description:
    """Names, dtypes, shapes, and for each tensor the index of the first tensor in the same memory."""
    values = tuple(tensors.values())
    first: dict[object, int] = {}
    owners = tuple(
        first.setdefault((value.data_ptr() or index, value.dtype, value.shape, value.stride()), index)
        for index, value in enumerate(values)
    )
    return tuple(tensors), tuple([v.dtype for v in values]), tuple([v.shape for v in values]), owners


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def copy_tensors(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copy ``sources`` over the ``targets`` of the same names, in place, on any devices."""
    # A tensor that is the target of several names, such as a tied parameter, is written once.
    once = {id(target): (target, sources[name]) for name, target in targets.items()}
    if once:
        with torch.inference_mode():  # it may write to any tensor, and only it to tensors that were made in it
            torch._foreach_copy_([target for target, _ in once.values()], [source for _, source in once.values()])


def clone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor on its own device. Tensors that share memory have copies that share memory."""
    names, _, _, owners = _describe(tensors)
    # A clone is on the device of its original. Without a lookup of the default device it takes 2 us instead of 12.
    with long_lived(), torch._C.DisableTorchFunction():
        copies = {names[owner]: tensors[names[owner]].detach().clone() for owner in set(owners)}
    return {name: copies[names[owner]] for name, owner in zip(names, owners, strict=True)}


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """A reference to a snapshot in shared memory, which travels to the workers.

    Attributes:
        number: the sender's id, and a number that counts up from 1.
        version: the trainer's own number for these weights, if it gave one.
        segment: the memory's descriptor.
        segment_id: the same for every snapshot in this memory.
        size: of the memory, in bytes.
        layout_id: of the layout of the tensors.
        layout: position of the pickled layout in the memory: first byte and number of bytes.
        extra_states: position of the pickled extra states.
        device: where a worker without a model gets the tensors; ``None``: on the CPU.
    """

    number: tuple[bytes, int]
    version: int | None
    segment: Descriptor
    segment_id: bytes
    size: int
    layout_id: bytes
    layout: tuple[int, int]
    extra_states: tuple[int, int]
    device: str | None = None


class SnapshotBuffer:
    """Shared memory for one snapshot at a time. Trainer only.

    Attributes:
        segment: the memory.
        refcount: how many workers may still read the snapshot. A buffer is written again only at 0.
    """

    def __init__(self, size: int) -> None:
        self.segment = AnonymousSharedMemory.create(size)
        self.refcount = 0
        self._layout: Layout | None = None
        self._views: dict[str, Tensor] = {}

    def write(self, weights: Weights, layout: Layout, extra_states: bytes) -> None:
        """Copy weights into the buffer."""
        if self._layout is not layout:
            self._layout = None  # until the layout is written completely
            views = layout.views(self.segment.memory)
            self.segment.write(layout.pickled, layout.nbytes)
            self._layout, self._views = layout, views
        copy_tensors(self._views, weights.tensors)
        self.segment.write(extra_states, layout.nbytes + len(layout.pickled))


class SnapshotPool:
    """The buffers of one sender. It allocates a buffer only while workers read all others.

    One thread at a time may use a pool. A worker's acknowledgement decreases the refcount of a buffer.
    """

    def __init__(self) -> None:
        self._buffers: list[SnapshotBuffer] = []
        self._description: Description | None = None
        self._layout: Layout | None = None
        self._sender = secrets.token_bytes(8)
        self._numbers = count(1)

    @property
    def refcounts(self) -> list[int]:
        """The refcount of each buffer."""
        return [buffer.refcount for buffer in self._buffers]

    def take(self, weights: Weights, version: int | None) -> tuple[SnapshotRef, SnapshotBuffer]:
        """Take a snapshot of ``weights`` as they are now.

        Returns:
            The reference to send, and the buffer. The caller counts the readers of the buffer.
        """
        layout = self.layout_of(weights.tensors)
        extra_states = pickle.dumps(weights.extra_states) if weights.extra_states else b""
        buffer = self._free(layout.nbytes + len(layout.pickled) + len(extra_states))
        buffer.write(weights, layout, extra_states)
        ref = SnapshotRef(
            number=(self._sender, next(self._numbers)),
            version=version,
            segment=Descriptor(buffer.segment.fd),
            segment_id=buffer.segment.id,
            size=len(buffer.segment),
            layout_id=layout.id,
            layout=(layout.nbytes, len(layout.pickled)),
            extra_states=(layout.nbytes + len(layout.pickled), len(extra_states)),
        )
        return ref, buffer

    def layout_of(self, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of ``tensors``; the same object for the same layout, so that readers unpickle it once."""
        description = _describe(tensors)
        if self._layout is None or description != self._description:
            self._description, self._layout = description, Layout.of(description)
        return self._layout

    def _free(self, nbytes: int) -> SnapshotBuffer:
        size = -(-nbytes // _PAGE) * _PAGE
        # An unused buffer that is too small, or far too large, is left from a model that is no longer published.
        self._buffers = [
            buffer for buffer in self._buffers if buffer.refcount or size <= len(buffer.segment) <= 2 * size
        ]
        for buffer in self._buffers:
            if not buffer.refcount and len(buffer.segment) >= size:
                return buffer
        self._buffers.append(SnapshotBuffer(size))
        return self._buffers[-1]


class SnapshotReader:
    """Maps snapshots. It keeps memory and layouts, since the next snapshot mostly has the same.

    Worker only, in one thread at a time.
    """

    def __init__(self) -> None:
        self._segments: dict[bytes, AnonymousSharedMemory] = {}
        self._layout: Layout | None = None
        self._views: dict[tuple[bytes, bytes], dict[str, Tensor]] = {}

    def read(self, ref: SnapshotRef) -> Weights:
        """Do as :meth:`view`, and close the descriptor of ``ref``."""
        try:
            return self.view(ref)
        finally:
            if ref.segment >= 0:
                os.close(ref.segment)

    def view(self, ref: SnapshotRef) -> Weights:
        """The weights, as views of the trainer's memory.

        Raises:
            OSError: there is no descriptor for the memory.
        """
        segment = self._segments.pop(ref.segment_id, None)
        if segment is None:
            if ref.segment < 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            segment = AnonymousSharedMemory(os.dup(ref.segment), ref.size, ref.segment_id)
        self._segments[segment.id] = segment
        while len(self._segments) > _MAX_MAPPED:
            self._segments.pop(next(iter(self._segments)))
        layout = self._layout
        if layout is None or layout.id != ref.layout_id:
            layout = self._layout = Layout.unpickle(segment.read(*ref.layout))
        key = (segment.id, layout.id)
        if key not in self._views:
            mapped = {known: views for known, views in self._views.items() if known[0] in self._segments}
            self._views = {**mapped, key: layout.views(segment.memory)}
        if not ref.extra_states[1]:
            return Weights(self._views[key], {})
        with long_lived():
            return Weights(self._views[key], pickle.loads(segment.read(*ref.extra_states)))
