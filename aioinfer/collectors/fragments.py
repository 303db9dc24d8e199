"""Fragments of experience in a ring of rows, which processes may share, and batches as views of it.

A batch has the observation that each step led to, in ``next``. This is the next step's observation, but where an
episode ends. So a layout may leave it out: then observations are stored for one step more, ``[T + 1]``, and those in
which episodes ended in a few places beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from torch import Tensor

from aioinfer.collectors.spaces import ArraySpec
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.tensors import build, entries, is_nested, show_key

__all__ = ["FragmentLayout", "FragmentRing", "TensorDictBuilder", "leaves", "with_next_observation"]

_Path: TypeAlias = tuple[str, ...]

_ALIGNMENT = 64
_FINAL: _Path = ("collector", "final")
_FINAL_STEP: _Path = ("collector", "final_step")
_DERIVED: tuple[_Path, ...] = (
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
        observations: paths of leaves that are stored for ``T + 1`` steps, where ``next`` is not stored.
        final_places: how many observations a fragment has room for in which an episode ended, ``F``; at least one if
            there are ``observations``. A fragment ends with the step that takes the last place.
    """

    leaves: tuple[ArraySpec, ...]
    length: int
    observations: tuple[_Path, ...] = ()
    final_places: int = 0

    def __post_init__(self) -> None:
        paths = [spec.path for spec in self.leaves]
        for path in paths:
            if path in _DERIVED or path == _FINAL_STEP or path[: len(_FINAL)] == _FINAL:
                raise ValueError(f"{show_key(path)} of a batch is computed from other entries, it can't be stored")
            for other in paths:
                if other != path and other[: len(path)] == path:
                    raise ValueError(f"{show_key(path)} is an array, so it can't contain {show_key(other)}")
        if len(set(paths)) != len(paths):
            raise ValueError(f"the leaves of a fragment must have different paths, got {paths}")
        for path in (("next", "terminated"), ("next", "truncated")):
            if path not in paths:
                raise ValueError(f"a fragment needs {show_key(path)}, got {paths}")
        if not set(self.observations) <= set(paths):
            raise ValueError(f"observations must be among the leaves, which are {paths}, got {self.observations}")
        if self.observations and self.final_places < 1:
            raise ValueError(f"final_places must be at least 1, got {self.final_places}")


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
        columns: by path, ``[num_rows, T, *shape]`` of each leaf, and ``[num_rows, T + 1, *shape]`` of ``observations``.
            Of these, the observation behind the latest complete step is valid too, unless the episode ended there.
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
        specs = [
            (spec.path, (num_rows, layout.length + (spec.path in layout.observations), *spec.shape), spec.dtype)
            for spec in layout.leaves
        ]
        if layout.observations:
            specs.append((_FINAL_STEP, (num_rows, layout.final_places), np.dtype(np.int64)))
            of_path = {spec.path: spec for spec in layout.leaves}
            specs += [
                ((*_FINAL, *path), (num_rows, layout.final_places, *of_path[path].shape), of_path[path].dtype)
                for path in layout.observations
            ]
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
        self.columns: dict[_Path, NDArray[Any]] = {}
        at = 2 * counters
        for (path, shape, dtype), size in zip(specs, sizes, strict=True):
            if dtype.hasobject:
                self.columns[path] = np.full(shape, None, dtype)
            else:
                self.columns[path] = data[at : at + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            at += size
        self._columns = list(self.columns.values())
        self._per_step = [self.columns[spec.path] for spec in layout.leaves if spec.path not in layout.observations]
        self._observations = [self.columns[path] for path in layout.observations]
        self._finals = [self.columns[*_FINAL, *path] for path in layout.observations]
        paths = list(self.columns)
        self._ends = paths.index(("next", "terminated")), paths.index(("next", "truncated"))
        self._builder = TensorDictBuilder([*paths, *_DERIVED])

    def assign(self, row: int, env: int) -> None:
        """Let ``row`` begin the next fragment of ``env``. Call it where the row is granted, before the writer knows."""
        self.lengths[row] = 0
        self.envs[row] = env
        if self._finals:
            self._clear_finals(row, 0)

    def keep_final(self, row: int, step: int, observation: Sequence[NDArray[Any]]) -> bool:
        """Keep the observation in which an episode ended, where ``next`` is not stored. Only the row's writer calls it.

        Args:
            row: which the fragment is in.
            step: of the fragment, that ended the episode. It is not complete yet: ``lengths`` are written later.
            observation: what the step returned, for each of the layout's ``observations``.

        Returns:
            Whether there is a place left. If not, the fragment ends with this step.
        """
        steps = self.columns[_FINAL_STEP][row]
        place = int(np.count_nonzero(steps >= 0))
        steps[place] = step  # first: what is written for a step that is never complete is found, and cleared
        for column, value in zip(self._finals, observation, strict=True):
            column[row, place] = value
        return place + 1 < self.layout.final_places

    def truncate(self, row: int) -> None:
        """Let the episode end with the last complete step of a fragment, as its environment is gone."""
        last = int(self.lengths[row]) - 1
        if last >= 0 and not self.columns["next", "terminated"][row, last]:
            self.columns["next", "truncated"][row, last] = True

    def _clear_finals(self, row: int, length: int) -> None:
        """Forget observations in which episodes ended behind so many steps."""
        steps = self.columns[_FINAL_STEP][row]
        behind = steps >= length
        if behind.any():
            for column in self._finals:
                column[row, behind] = _nothing(column)
        steps[behind] = -1

    def batch(self, rows: Sequence[int], lengths: Sequence[int]) -> TensorDict:
        """Make a batch of fragments.

        Args:
            rows: of the fragments, at least one.
            lengths: how many steps of each are valid; those behind become zeros in the ring too.

        Returns:
            A TensorDict ``[len(rows), T]``. Its leaves are views of the ring if the rows are consecutive, else copies.
            Where ``next`` observations are not stored, it is a TensorDict ``[len(rows)]`` with leaves of the same
            shapes, but ``observations`` ``[len(rows), T + 1, *shape]``, and below ``("collector", "final")`` those in
            which episodes ended, ``[len(rows), F, *shape]``, at the steps ``("collector", "final_step")``, or -1 where
            a place is not used: see :func:`with_next_observation`.
        """
        rows, lengths = list(rows), list(lengths)
        steps = self.layout.length
        for row, length in zip(rows, lengths, strict=True):
            if length < steps:
                for column in self._per_step:
                    column[row, length:] = _nothing(column)
        if self._observations:
            self._clear_unknown(rows, lengths)
        first, count = rows[0], len(rows)
        if rows == list(range(first, first + count)):
            columns = [column[first : first + count] for column in self._columns]
        else:
            columns = [column.take(rows, 0) for column in self._columns]
        terminated, truncated = (columns[end] for end in self._ends)
        false = np.zeros((3, count, steps, 1), np.bool_)
        env = np.repeat(self.envs[rows], steps).reshape(count, steps)
        mask = np.arange(steps) < np.array(lengths)[:, None]
        size = torch.Size((count,) if self._observations else (count, steps))
        return self._builder.build([*columns, *false, terminated | truncated, env, mask], size)

    def _clear_unknown(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Write zeros where no observation is, of those that are stored for one step more."""
        for row, length in zip(rows, lengths, strict=True):
            if length < self.layout.length:
                self._clear_finals(row, length)
            ended = (self.columns[_FINAL_STEP][row] == length - 1).any()
            for column in self._observations:
                column[row, length + (not ended) :] = _nothing(column)


class TensorDictBuilder:
    """Makes TensorDicts of arrays with nested paths; of arrays of objects it makes non-tensor data.

    Args:
        paths: of the leaves, in the order in which :meth:`build` gets them.
    """

    def __init__(self, paths: Sequence[_Path]) -> None:
        nodes: dict[_Path, int] = {(): 0}
        for path in paths:
            for depth in range(1, len(path)):
                nodes.setdefault(path[:depth], len(nodes))
        self._leaves = [(nodes[path[:-1]], path[-1]) for path in paths]
        self._nodes = [(number, nodes[path[:-1]], path[-1]) for path, number in nodes.items() if path]
        self._nodes.reverse()  # a node comes behind those in it

    def build(self, leaves: Sequence[NDArray[Any]], size: torch.Size) -> TensorDict:
        """Make a TensorDict ``[*size]`` that shares the memory of the leaves, ``[*size, *shape]`` each."""
        nodes: list[dict[str, Any]] = [{} for _ in range(len(self._nodes) + 1)]
        with torch.inference_mode(False):  # or autograd could not save the tensors
            for (node, name), leaf in zip(self._leaves, leaves, strict=True):
                nodes[node][name] = _entry(leaf)
        for node, parent, name in self._nodes:
            nodes[parent][name] = build(nodes[node], size, None)
        return build(nodes[0], size, None)


def leaves(batch: TensorDictBase, prefix: _Path = ()) -> dict[_Path, NDArray[Any]]:
    """Take the leaves of a batch by their paths, which share its memory; non-tensor data as an array of objects."""
    found: dict[_Path, NDArray[Any]] = {}
    for name, value in entries(batch).items():
        if isinstance(value, Tensor):
            found[*prefix, name] = value.numpy()
        elif is_nested(value):
            found |= leaves(value, (*prefix, name))
        else:
            found[*prefix, name] = np.array(value.tolist(), object)
    return found


def with_next_observation(batch: TensorDictBase) -> TensorDict:
    """Make the batch that a layout with ``next`` observations has, of one without.

    Args:
        batch: ``[B]``, of a ring that stores observations for ``T + 1`` steps.

    Returns:
        A TensorDict ``[B, T]``. Observations are copies, other leaves are shared.
    """
    known = leaves(batch)
    final_step, mask = known.pop(_FINAL_STEP), known["collector", "mask"]
    row, place = np.nonzero(final_step >= 0)
    for final_path in [path for path in known if path[: len(_FINAL)] == _FINAL]:
        path = final_path[len(_FINAL) :]
        final, both = known.pop(final_path), known[path]
        observation, following = both[:, :-1].copy(), both[:, 1:].copy()
        observation[~mask] = _nothing(observation)
        following[row, final_step[row, place]] = final[row, place]
        known[path], known["next", *path] = observation, following
    return TensorDictBuilder(list(known)).build(list(known.values()), torch.Size(mask.shape))


def _nothing(column: NDArray[Any]) -> Any:
    """What an array has where there is no step."""
    return None if column.dtype.hasobject else 0


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
