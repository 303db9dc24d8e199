"""Fragments of experience in a ring of rows, which processes may share, and batches as views of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import NonTensorStack, TensorDict

from aioinfer.collectors.spaces import ArraySpec
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.tensors import build, show_key

__all__ = ["FragmentLayout", "FragmentRing", "TensorDictBuilder"]

_ALIGNMENT = 64
_DERIVED = (
    ("done",),
    ("terminated",),
    ("truncated",),
    ("next", "done"),
    ("collector", "env"),
    ("collector", "mask"),
)


@dataclass(frozen=True)
class FragmentLayout:
    """What is stored of each step of a fragment.

    Attributes:
        leaves: arrays of one step, with their paths in a batch, e.g. ``("next", "reward")``. Of dtype ``object`` only
            where the ring is not shared. ``("next", "terminated")`` and ``("next", "truncated")`` are among them.
        length: steps of a complete fragment, ``T``.
    """

    leaves: tuple[ArraySpec, ...]
    length: int

    def __post_init__(self) -> None:
        paths = [spec.path for spec in self.leaves]
        for path in paths:
            if path in _DERIVED:
                raise ValueError(f"{show_key(path)} of a batch is computed from other entries, it can't be stored")
            for other in paths:
                if other != path and other[: len(path)] == path:
                    raise ValueError(f"{show_key(path)} is an array, so it can't contain {show_key(other)}")
        if len(set(paths)) != len(paths):
            raise ValueError(f"the leaves of a fragment must have different paths, got {paths}")
        for path in (("next", "terminated"), ("next", "truncated")):
            if path not in paths:
                raise ValueError(f"a fragment needs {show_key(path)}, got {paths}")


class FragmentRing:
    """Rows of ``T`` steps each, in memory that is allocated once. A row takes one fragment at a time.

    Who writes a row owns it until the fragment is finished, then the reader until it releases it: a
    :class:`~aioinfer.collectors.scheduler.FragmentScheduler` says who is next.

    Args:
        layout: of the fragments.
        num_rows: how many there are.
        descriptor: of the memory, where another process has made it of the same layout; the ring's own from now on.
        shared: whether other processes are to write rows.

    Attributes:
        columns: by path, ``[num_rows, T, *shape]`` of each leaf.
        lengths: int64 ``[num_rows]``, the complete steps of the fragment in each row. The writer adds one when all
            data of a step are written.
        envs: int64 ``[num_rows]``, the environment whose fragment each row contains.
        memory: by whose descriptor another process gets it; ``None`` if it is not shared.

    Raises:
        ValueError: a leaf of Python objects is to be shared.
    """

    def __init__(
        self, layout: FragmentLayout, num_rows: int, *, descriptor: int | None = None, shared: bool = True
    ) -> None:
        self.layout = layout
        self.num_rows = num_rows
        specs = [(spec.path, (num_rows, layout.length, *spec.shape), spec.dtype) for spec in layout.leaves]
        for path, _, dtype in specs:
            if dtype.hasobject and (shared or descriptor is not None):
                raise ValueError(
                    f"{show_key(path)} consists of Python objects, which processes can't share: "
                    "collect such an environment in this process (num_workers=0)"
                )
        counters = _aligned(num_rows * 8)
        sizes = [0 if dtype.hasobject else _aligned(prod(shape) * dtype.itemsize) for _, shape, dtype in specs]
        nbytes = 2 * counters + sum(sizes)
        self.memory: AnonymousSharedMemory | None = None
        if descriptor is not None:
            self.memory = AnonymousSharedMemory(descriptor, nbytes, b"")
        elif shared:
            self.memory = AnonymousSharedMemory.create(nbytes)
        data = _zeros(nbytes) if self.memory is None else np.frombuffer(self.memory.view, np.uint8)
        self.lengths: NDArray[np.int64] = data[: num_rows * 8].view(np.int64)
        self.envs: NDArray[np.int64] = data[counters : counters + num_rows * 8].view(np.int64)
        self.columns: dict[tuple[str, ...], NDArray[Any]] = {}
        at = 2 * counters
        for (path, shape, dtype), size in zip(specs, sizes, strict=True):
            if dtype.hasobject:
                self.columns[path] = np.full(shape, None, dtype)
            else:
                self.columns[path] = data[at : at + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            at += size
        self._columns = list(self.columns.values())
        paths = list(self.columns)
        self._ends = paths.index(("next", "terminated")), paths.index(("next", "truncated"))
        self._builder = TensorDictBuilder([*paths, *_DERIVED])

    def assign(self, row: int, env: int) -> None:
        """Let ``row`` begin the next fragment of ``env``. Call it where the row is granted, before the writer knows."""
        self.lengths[row] = 0
        self.envs[row] = env

    def batch(self, rows: Sequence[int], lengths: Sequence[int]) -> TensorDict:
        """Make a batch of fragments.

        Args:
            rows: of the fragments, at least one.
            lengths: how many steps of each are valid; those behind become zeros in the ring too.

        Returns:
            A TensorDict ``[len(rows), T]``. Its leaves are views of the ring if the rows are consecutive, else copies.
        """
        rows, lengths = list(rows), list(lengths)
        steps = self.layout.length
        for row, length in zip(rows, lengths, strict=True):
            if length < steps:
                for column in self._columns:
                    column[row, length:] = None if column.dtype.hasobject else 0
        first, count = rows[0], len(rows)
        if rows == list(range(first, first + count)):
            leaves = [column[first : first + count] for column in self._columns]
        else:
            leaves = [column.take(rows, 0) for column in self._columns]
        terminated, truncated = (leaves[end] for end in self._ends)
        false = np.zeros((3, count, steps, 1), np.bool_)
        env = np.repeat(self.envs[rows], steps).reshape(count, steps)
        mask = np.arange(steps) < np.array(lengths)[:, None]
        return self._builder.build([*leaves, *false, terminated | truncated, env, mask], torch.Size((count, steps)))


class TensorDictBuilder:
    """Makes TensorDicts of arrays with nested paths; of arrays of objects it makes non-tensor data.

    Args:
        paths: of the leaves, in the order in which :meth:`build` gets them.
    """

    def __init__(self, paths: Sequence[tuple[str, ...]]) -> None:
        nodes: dict[tuple[str, ...], int] = {(): 0}
        for path in paths:
            for depth in range(1, len(path)):
                nodes.setdefault(path[:depth], len(nodes))
        self._leaves = [(nodes[path[:-1]], path[-1]) for path in paths]
        self._nodes = [(number, nodes[path[:-1]], path[-1]) for path, number in nodes.items() if path]
        self._nodes.reverse()  # a node comes behind those in it

    def build(self, leaves: Sequence[NDArray[Any]], size: torch.Size) -> TensorDict:
        """Make a TensorDict ``[*size]`` that shares the memory of the leaves, ``[*size, *shape]`` each."""
        entries: list[dict[str, Any]] = [{} for _ in range(len(self._nodes) + 1)]
        with torch.inference_mode(False):  # or autograd could not save the tensors
            for (node, name), leaf in zip(self._leaves, leaves, strict=True):
                entries[node][name] = _entry(leaf)
        for node, parent, name in self._nodes:
            entries[parent][name] = build(entries[node], size, None)
        return build(entries[0], size, None)


def _entry(column: NDArray[Any]) -> Any:
    """An array as an entry of a TensorDict. Its version counter is its own: batches may be written to in place."""
    return NonTensorStack.from_list(column.tolist()) if column.dtype.hasobject else torch.from_numpy(column)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _zeros(nbytes: int) -> NDArray[np.uint8]:
    """Zeros whose address is aligned."""
    data = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -data.ctypes.data % _ALIGNMENT
    return data[start : start + nbytes]
