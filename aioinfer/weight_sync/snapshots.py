"""Snapshots: all tensors of a weight set, side by side in one piece of memory."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from aioinfer.modes import long_lived

__all__ = ["Layout", "LayoutCache", "copy_tensors", "snapshot"]

_ALIGNMENT = 64  # bytes; a cache line, and enough for every dtype


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor lies.

    Attributes:
        names: dotted names.
        dtypes: of each tensor.
        shapes: of each tensor.
        offsets: in bytes. Tensors that share memory in the source (tied parameters) share it here.
        nbytes: of all of them.
        id: the same in every process that has this layout.
        pickled: the layout for other processes.
    """

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    nbytes: int
    id: bytes
    pickled: bytes = field(repr=False)

    @classmethod
    def of(cls, description: Description) -> Layout:
        """Lay out tensors that were described by :func:`_describe`."""
        names, dtypes, shapes, owners = description
        sizes = [
            _aligned(dtype.itemsize * torch.Size(shape).numel()) if owner == index else 0
            for index, (dtype, shape, owner) in enumerate(zip(dtypes, shapes, owners, strict=True))
        ]
        starts = [0, *accumulate(sizes)]
        offsets = tuple(starts[owner] for owner in owners)
        fields = (names, dtypes, tuple(map(tuple, shapes)), offsets, starts[-1], secrets.token_bytes(8))
        return cls.unpickle(pickle.dumps(fields))

    @classmethod
    def unpickle(cls, pickled: bytes) -> Layout:
        """Make a layout of what ``pickled`` has."""
        names, dtypes, shapes, offsets, nbytes, layout_id = pickle.loads(pickled)
        return cls(names, dtypes, shapes, offsets, nbytes, layout_id, pickled)

    @long_lived()
    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in ``memory``, ``[nbytes]`` of ``uint8``, by name."""
        return {
            name: memory[offset : offset + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
            for name, dtype, shape, offset in zip(self.names, self.dtypes, self.shapes, self.offsets, strict=True)
        }


Description = tuple[tuple[str, ...], tuple[torch.dtype, ...], tuple[torch.Size, ...], tuple[int, ...]]


class LayoutCache:
    """Gives the same layout as long as the tensors have it, which saves sending it again."""

    def __init__(self) -> None:
        self._description: Description | None = None
        self._layout: Layout | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of ``tensors``."""
        description = _describe(tensors)
        if self._layout is None or description != self._description:
            self._description, self._layout = description, Layout.of(description)
        return self._layout


def _describe(tensors: Mapping[str, Tensor]) -> Description:
    """Names, dtypes, shapes, and for each tensor the index of the first one that is the same memory."""
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
    """Copy ``sources`` over the ``targets`` of the same names, in place, on whatever devices both are."""
    # Targets that are one and the same, as tied parameters are, are written once.
    once = {id(target): (target, sources[name]) for name, target in targets.items()}
    if once:
        with torch.inference_mode():  # in which tensors may be written to that were made in it, and all others too
            torch._foreach_copy_([target for target, _ in once.values()], [source for _, source in once.values()])


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, each to where it is. Those that share memory go on sharing it."""
    names, _, _, owners = _describe(tensors)
    # A clone is where its original is, whatever the default device: without asking it each takes 2 us instead of 12.
    with long_lived(), torch._C.DisableTorchFunction():
        copies = {names[owner]: tensors[names[owner]].detach().clone() for owner in set(owners)}
    return {name: copies[names[owner]] for name, owner in zip(names, owners, strict=True)}
