"""Publications: snapshots in shared memory. The trainer writes them, and what travels says only where they lie."""

from __future__ import annotations

import errno
import os
import pickle
import secrets
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.queue import Descriptor
from aioinfer.modes import long_lived
from aioinfer.weight_sync.snapshots import Layout, LayoutCache, copy_tensors
from aioinfer.weight_sync.weights import Weights

__all__ = ["UPDATE", "Publication", "Reader", "Shelf", "Stored", "message", "opened"]

UPDATE = "update_weights"


def message(model_id: str, weights: Any) -> tuple[tuple[str, Any], str]:
    """A message on a weight queue."""
    return (model_id, weights), UPDATE


def opened(received: Any) -> tuple[str, Any]:
    """The model id and the weights of a message; raise :class:`ValueError` that names anything else."""
    match received:
        case ((str() as model_id, weights), "update_weights"):
            return model_id, weights
        case (_, str() as kind):
            raise ValueError(f'expected "{UPDATE}" on the weight queue, got "{kind}"')
    raise ValueError(f'expected ((model_id, weights), "{UPDATE}") on the weight queue, got {received!r:.200}')


@dataclass(frozen=True, slots=True)
class Publication:
    """A snapshot that the trainer has published, and where in shared memory it lies.

    Attributes:
        number: the sender's id, and a number that counts up from 1.
        version: the sender's own number for these weights, if it gave one.
        segment: the memory.
        segment_id: the same for every publication in this memory.
        size: of the memory, in bytes.
        layout_id: of the layout of the tensors.
        layout: where in the memory it is pickled: first byte and number of bytes.
        extra_states: the same for the extra states of modules.
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


_ROUND = 65536  # bytes; room for extra states that grow


class Stored:
    """One piece of the trainer's shared memory, and what is in it. Trainer only.

    Attributes:
        readers: how many workers may still read it; at 0 it may be written again.
    """

    def __init__(self, size: int) -> None:
        self.segment = AnonymousSharedMemory.create(size)
        self.readers = 0
        self._layout: Layout | None = None
        self._views: dict[str, Tensor] = {}

    @property
    def descriptor(self) -> Descriptor:
        """What a message carries."""
        return Descriptor(self.segment.fd)

    def write(self, weights: Weights, layout: Layout, extra_states: bytes) -> None:
        """Copy weights here."""
        if self._layout is not layout:
            self._layout = None  # until all of it is there
            views = layout.views(self.segment.memory)
            self.segment.write(layout.pickled, layout.nbytes)
            self._layout, self._views = layout, views
        copy_tensors(self._views, weights.tensors)
        self.segment.write(extra_states, layout.nbytes + len(layout.pickled))


class Shelf:
    """The trainer's publications. It takes new memory only while all that it has is being read."""

    def __init__(self) -> None:
        self._stored: list[Stored] = []
        self._layouts = LayoutCache()
        self._sender = secrets.token_bytes(8)
        self._numbers = count(1)

    def publish(self, weights: Weights, version: int | None) -> tuple[Publication, Stored]:
        """Take a snapshot of ``weights`` as they are now.

        Returns:
            What to send, and where it lies. Whoever sends it counts its readers.
        """
        layout = self._layouts.of(weights.tensors)
        extra_states = pickle.dumps(weights.extra_states) if weights.extra_states else b""
        stored = self._free(layout.nbytes + len(layout.pickled) + len(extra_states))
        stored.write(weights, layout, extra_states)
        publication = Publication(
            number=(self._sender, next(self._numbers)),
            version=version,
            segment=stored.descriptor,
            segment_id=stored.segment.id,
            size=len(stored.segment),
            layout_id=layout.id,
            layout=(layout.nbytes, len(layout.pickled)),
            extra_states=(layout.nbytes + len(layout.pickled), len(extra_states)),
        )
        return publication, stored

    def _free(self, nbytes: int) -> Stored:
        size = -(-nbytes // _ROUND) * _ROUND
        # What nobody reads and is too small, or far too large, is left from a model that is no longer published.
        self._stored = [stored for stored in self._stored if stored.readers or size <= len(stored.segment) <= 2 * size]
        for stored in self._stored:
            if not stored.readers and len(stored.segment) >= size:
                return stored
        self._stored.append(Stored(size))
        return self._stored[-1]


_KEPT = 4  # segments; a trainer alternates between three at most


class Reader:
    """Reads publications. It remembers memory and layouts: the next publication mostly has the same. Worker only."""

    def __init__(self) -> None:
        self._segments: dict[bytes, AnonymousSharedMemory] = {}
        self._layout: Layout | None = None
        self._views: dict[tuple[bytes, bytes], dict[str, Tensor]] = {}

    def read(self, publication: Publication) -> Weights:
        """Do as :meth:`view`, and use the publication's descriptor up."""
        try:
            return self.view(publication)
        finally:
            if publication.segment >= 0:
                os.close(publication.segment)

    def view(self, publication: Publication) -> Weights:
        """The weights, as views of the trainer's memory.

        Raises:
            OSError: there is no descriptor for the memory.
        """
        segment = self._segments.pop(publication.segment_id, None)
        if segment is None:
            if publication.segment < 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            segment = AnonymousSharedMemory(os.dup(publication.segment), publication.size, publication.segment_id)
        self._segments[segment.id] = segment
        while len(self._segments) > _KEPT:
            self._segments.pop(next(iter(self._segments)))
        layout = self._layout
        if layout is None or layout.id != publication.layout_id:
            layout = self._layout = Layout.unpickle(segment.read(*publication.layout))
        key = (segment.id, layout.id)
        if key not in self._views:
            alive = {known: views for known, views in self._views.items() if known[0] in self._segments}
            self._views = {**alive, key: layout.views(segment.memory)}
        if not publication.extra_states[1]:
            return Weights(self._views[key], {})
        with long_lived():
            return Weights(self._views[key], pickle.loads(segment.read(*publication.extra_states)))
