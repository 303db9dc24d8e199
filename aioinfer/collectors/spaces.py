"""Spaces of observations and actions as arrays of a fixed layout, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ActionWriter",
    "ArraySpec",
    "Column",
    "EnvLayout",
    "InfoKeys",
    "action_columns",
    "array_specs",
    "as_items",
    "batched_action_writer",
    "env_layout",
    "info_columns",
    "info_specs",
    "observation_columns",
    "row_action_writer",
    "single_action_writer",
]

InfoKeys: TypeAlias = Sequence[str] | Mapping[str, Any]
"""Entries of infos to store: names, which are float64 scalars, or the dtype of each, or its shape and dtype."""

ActionWriter: TypeAlias = Callable[[Sequence[NDArray[Any]]], Any]
"""Makes what environments take out of the leaves of actions, ``[k, *shape]`` each."""

_KINDS = frozenset({"Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple", "Text"})
_MANY_BYTES = 1024
"""Rows from this size on are copied one by one: to copy them twice takes longer than a loop."""


class ArraySpec(NamedTuple):
    """One leaf of an observation, an action or an info.

    Attributes:
        path: its key in a batch, such as ``("observation", "camera")`` or ``("action",)``.
        shape: of one row.
        dtype: ``object`` for text.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class EnvLayout:
    """The leaves of what an environment takes and returns.

    Attributes:
        observation: its leaves.
        action: its leaves.
        info: its leaves.
        example: for each leaf of the observation a value that its space contains, by default of ones, which a mask of
            actions must have. Layouts are equal whatever their examples are.
    """

    observation: tuple[ArraySpec, ...]
    action: tuple[ArraySpec, ...]
    info: tuple[ArraySpec, ...] = ()
    example: tuple[NDArray[Any], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.example:
            ones = [np.full(spec.shape, "" if spec.dtype == object else 1, spec.dtype) for spec in self.observation]
            object.__setattr__(self, "example", tuple(ones))


def env_layout(observation_space: Any, action_space: Any, info_keys: InfoKeys = ()) -> EnvLayout:
    """The layout of an environment with these spaces.

    Raises:
        TypeError: a space has no fixed layout; the message says which, and where it is.
    """
    return EnvLayout(
        array_specs(observation_space, ("observation",)),
        array_specs(action_space, ("action",)),
        info_specs(info_keys),
        _example(observation_space, ("observation",)),
    )


def array_specs(space: Any, path: tuple[str, ...]) -> tuple[ArraySpec, ...]:
    """The leaves of a space, below ``path``; entries of dictionaries in the order of their names.

    Raises:
        TypeError: a space has no fixed layout.
    """
    kind = _kind(space, path)
    if kind in ("Dict", "Tuple"):
        entries = _entries(space, kind, path)
        if not entries:
            raise TypeError(f"the space of {_show(path)} has no entries: {space}")
        return tuple(spec for _, name, entry in entries for spec in array_specs(entry, (*path, name)))
    if kind == "Box":
        return (ArraySpec(path, tuple(space.shape), np.dtype(space.dtype)),)
    if kind == "Discrete":
        return (ArraySpec(path, (), np.dtype(np.int64)),)
    if kind == "MultiDiscrete":
        return (ArraySpec(path, tuple(space.shape), np.dtype(np.int64)),)
    if kind == "MultiBinary":
        return (ArraySpec(path, tuple(space.shape), np.dtype(np.int8)),)
    return (ArraySpec(path, (), np.dtype(object)),)


def _example(space: Any, path: tuple[str, ...]) -> tuple[NDArray[Any], ...]:
    """For each leaf of a space the value nearest to ones."""
    kind = _kind(space, path)
    if kind in ("Dict", "Tuple"):
        return tuple(leaf for _, name, entry in _entries(space, kind, path) for leaf in _example(entry, (*path, name)))
    (spec,) = array_specs(space, path)
    if kind == "Text":
        return (np.full((), "", object),)
    low: Any = 1
    high: Any = 1
    if kind == "Box":
        low, high = space.low, space.high
    elif kind in ("Discrete", "MultiDiscrete"):
        low = getattr(space, "start", 0)
        high = low + (space.n if kind == "Discrete" else space.nvec) - 1
    return (np.minimum(np.maximum(np.ones(spec.shape, spec.dtype), low), high).astype(spec.dtype),)


def info_specs(info_keys: InfoKeys) -> tuple[ArraySpec, ...]:
    """The leaves of the infos, in the order of the keys.

    Raises:
        TypeError: the keys are one string.
    """
    if isinstance(info_keys, str):
        raise TypeError(f"info_keys must be a sequence of names or a mapping, got the string {info_keys!r}")
    wanted = info_keys if isinstance(info_keys, Mapping) else dict.fromkeys(info_keys, np.float64)
    specs = []
    for key, kind in wanted.items():
        shape, dtype = kind if isinstance(kind, tuple) else ((), kind)
        specs.append(ArraySpec(("info", key), tuple(shape), np.dtype(dtype)))
    return tuple(specs)


class Column:
    """One leaf of the observations, actions or infos of many rows.

    Args:
        spec: the leaf.
        keys: where it is in what an environment returns.
        missing: the value of a row that lacks it; without one that is an error.
    """

    def __init__(self, spec: ArraySpec, keys: Sequence[str | int] = (), missing: Any = None) -> None:
        self.spec = spec
        self._keys = tuple(keys)
        self._missing = missing
        self._many = int(np.prod(spec.shape)) * spec.dtype.itemsize >= _MANY_BYTES
        self._castable: dict[np.dtype[Any], bool] = {spec.dtype: True}

    def empty(self, size: int) -> NDArray[Any]:
        """Rows for this leaf: zeros, or empty texts."""
        if self.spec.dtype == object:
            return np.full(size, "", object)
        return np.zeros((size, *self.spec.shape), self.spec.dtype)

    def gather(self, values: Sequence[Any], out: NDArray[Any], rows: NDArray[np.int64] | None) -> bool:
        """Write the leaf of each value into its row, if all of them have the right layout.

        Args:
            values: what environments have returned.
            out: ``[size, *shape]``.
            rows: the row of each value; ``None`` for all rows in their order.

        Returns:
            Whether it is done. If not, :meth:`put` says for each value whether it is the one that is wrong.
        """
        try:
            for key in self._keys:
                values = [value[key] for value in values]
            if self._many:
                return self._gather_one_by_one(values, out, rows)
            if self.spec.dtype == object:
                if not all(isinstance(value, str) for value in values):
                    return False
                out[... if rows is None else rows] = values
                return True
            array = np.array(values)
            if array.shape[1:] != self.spec.shape or not self._can_cast(array.dtype):
                return False
            out[... if rows is None else rows] = array
        except Exception:  # values of the user's may raise anything
            return False
        return True

    def _gather_one_by_one(self, values: Sequence[Any], out: NDArray[Any], rows: NDArray[np.int64] | None) -> bool:
        shape, can_cast = self.spec.shape, self._castable.get
        for row, value in zip(range(len(out)) if rows is None else rows.tolist(), values, strict=True):
            if value.shape != shape or not can_cast(value.dtype):
                return False
            out[row] = value
        return True

    def read(self, batch: Any, size: int) -> NDArray[Any]:
        """Take the leaf ``[size, *shape]`` out of what a vectorised environment returns for ``size`` rows.

        Raises:
            ValueError: as :meth:`put`.
        """
        spec = self.spec
        for key in self._keys:
            try:
                batch = batch[key]
            except Exception as error:  # values of the user's may raise anything
                raise ValueError(f"{_show(spec.path)} is missing") from error
        array = np.asarray(batch)
        if array.shape != (size, *spec.shape):
            raise ValueError(
                f"{_show(spec.path)} has shape {list(array.shape)}, {size} rows of its space have {[size, *spec.shape]}"
            )
        if spec.dtype == object:
            if not all(isinstance(value, str) for value in array.tolist()):
                raise ValueError(f"{_show(spec.path)} is {array.tolist()!r}, its space has texts")
            return array.astype(object)
        if not self._can_cast(array.dtype) and not _same_integers(array, spec.dtype):
            raise ValueError(f"{_show(spec.path)} has dtype {array.dtype}, its space has {spec.dtype}")
        return array

    def put(self, value: Any, out: NDArray[Any], row: int) -> None:
        """Write the leaf of one value into a row.

        Raises:
            ValueError: it has another shape, or a dtype that can't be cast to that of the space; the message says what.
        """
        spec = self.spec
        for key in self._keys:
            try:
                value = value[key]
            except Exception as error:  # values of the user's may raise anything
                if self._missing is not None:
                    value = None
                    break
                raise ValueError(f"{_show(spec.path)} is missing") from error
        if value is None and self._missing is not None:
            value = self._missing
        if spec.dtype == object:
            if not isinstance(value, str):
                raise ValueError(f"{_show(spec.path)} is {value!r}, its space has texts")
            out[row] = value
            return
        array = np.asarray(value)
        if array.shape != spec.shape:
            raise ValueError(f"{_show(spec.path)} has shape {list(array.shape)}, its space has {list(spec.shape)}")
        if not self._can_cast(array.dtype) and not _same_integers(array, spec.dtype):
            raise ValueError(f"{_show(spec.path)} has dtype {array.dtype}, its space has {spec.dtype}")
        out[row] = array

    def _can_cast(self, dtype: np.dtype[Any]) -> bool:
        known = self._castable.get(dtype)
        if known is None:
            known = self._castable[dtype] = np.can_cast(dtype, self.spec.dtype, "same_kind")
        return known


def as_items(rows: NDArray[Any]) -> NDArray[Any]:
    """View rows ``[n, k]`` of numbers as ``[n]`` items, for assignments by an index; return other arrays as they are.

    To copy 128 rows of 4 numbers takes 0.5 us as items, and 5 us as rows. Items of other dtypes don't fit each other.
    """
    if rows.ndim != 2 or not rows.shape[1] or rows.dtype.hasobject or not rows.flags.c_contiguous:
        return rows
    return rows.view(_item(rows.shape[1] * rows.itemsize)).ravel()


@cache
def _item(nbytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, nbytes))


def _same_integers(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    return array.dtype.kind in "biu" and dtype.kind in "biu" and bool((array.astype(dtype) == array).all())


def observation_columns(space: Any) -> list[Column]:
    """The leaves of observations of that space."""
    return _columns(space, ("observation",), ())


def action_columns(space: Any) -> list[Column]:
    """The leaves of actions of that space."""
    return _columns(space, ("action",), ())


def _columns(space: Any, path: tuple[str, ...], keys: tuple[str | int, ...]) -> list[Column]:
    kind = _kind(space, path)
    if kind in ("Dict", "Tuple"):
        entries = _entries(space, kind, path)
        return [column for key, name, entry in entries for column in _columns(entry, (*path, name), (*keys, key))]
    (spec,) = array_specs(space, path)
    return [Column(spec, keys)]


def info_columns(specs: Sequence[ArraySpec]) -> list[Column]:
    """The leaves of infos; where an info lacks one it is NaN, or 0 if it is no float."""
    return [
        Column(spec, (spec.path[1],), np.full(spec.shape, np.nan if spec.dtype.kind in "fc" else 0, spec.dtype))
        for spec in specs
    ]


def row_action_writer(space: Any) -> ActionWriter:
    """Make the list of actions of ``k`` environments, each of which is a value of ``space``, and shares no memory."""
    write = _row_writer(space, ("action",))
    return lambda leaves: write(iter(leaves))


def _row_writer(space: Any, path: tuple[str, ...]) -> Callable[[Iterator[NDArray[Any]]], list[Any]]:
    kind = _kind(space, path)
    if kind in ("Dict", "Tuple"):
        entries = _entries(space, kind, path)
        writers = [_row_writer(entry, (*path, name)) for _, name, entry in entries]
        if kind == "Tuple":
            return lambda leaves: list(zip(*[write(leaves) for write in writers], strict=True))
        keys = [key for key, _, _ in entries]
        return lambda leaves: [
            dict(zip(keys, values, strict=True)) for values in zip(*[write(leaves) for write in writers], strict=True)
        ]
    if kind == "Discrete":  # numpy's integers, as the space's own samples: Gymnasium checks them faster than Python's
        return lambda leaves: list(next(leaves).astype(np.int64, copy=False))
    if kind == "Text":
        return lambda leaves: list(next(leaves))
    dtype = np.dtype(space.dtype)
    if not space.shape:  # a row of an array of numbers is no array, which spaces warn of
        return lambda leaves: [np.array(value, dtype) for value in next(leaves)]
    return lambda leaves: list(next(leaves).astype(dtype))


def single_action_writer(space: Any) -> ActionWriter:
    """Make the action of one environment, a value of ``space``, of leaves ``[*shape]``; it shares no memory."""
    write = _single_writer(space, ("action",))
    return lambda leaves: write(iter(leaves))


def _single_writer(space: Any, path: tuple[str, ...]) -> Callable[[Iterator[Any]], Any]:
    kind = _kind(space, path)
    if kind in ("Dict", "Tuple"):
        entries = _entries(space, kind, path)
        writers = [_single_writer(entry, (*path, name)) for _, name, entry in entries]
        if kind == "Tuple":
            return lambda leaves: tuple(write(leaves) for write in writers)
        keys = [key for key, _, _ in entries]
        return lambda leaves: {key: write(leaves) for key, write in zip(keys, writers, strict=True)}
    if kind == "Discrete":
        return lambda leaves: np.int64(next(leaves))
    if kind == "Text":
        return next
    dtype = np.dtype(space.dtype)
    return lambda leaves: np.array(next(leaves), dtype)


def batched_action_writer(space: Any) -> ActionWriter:
    """Make the action of a vectorised environment of ``k`` rows out of leaves, ``space`` being that of one row."""
    write = _batch_writer(space, ("action",))
    return lambda leaves: write(iter(leaves))


def _batch_writer(space: Any, path: tuple[str, ...]) -> Callable[[Iterator[NDArray[Any]]], Any]:
    kind = _kind(space, path)
    if kind in ("Dict", "Tuple"):
        entries = _entries(space, kind, path)
        writers = [_batch_writer(entry, (*path, name)) for _, name, entry in entries]
        if kind == "Tuple":
            return lambda leaves: tuple(write(leaves) for write in writers)
        keys = [key for key, _, _ in entries]
        return lambda leaves: {key: write(leaves) for key, write in zip(keys, writers, strict=True)}
    if kind == "Text":
        return lambda leaves: tuple(next(leaves))
    dtype = np.dtype(space.dtype)
    return lambda leaves: next(leaves).astype(dtype)


def _kind(space: Any, path: tuple[str, ...]) -> str:
    for base in type(space).__mro__:
        if base.__name__ in _KINDS:
            return base.__name__
    raise TypeError(
        f"the space of {_show(path)} has no fixed layout: {space!r}; wrap the environment so that it has one of Box, "
        "Discrete, MultiDiscrete, MultiBinary or Text, or a Dict or Tuple of them"
    )


def _entries(space: Any, kind: str, path: tuple[str, ...]) -> list[tuple[str | int, str, Any]]:
    """Key, name and space of each entry."""
    if kind == "Tuple":
        return [(index, str(index), entry) for index, entry in enumerate(space.spaces)]
    for key in space.spaces:
        if not isinstance(key, str):
            raise TypeError(f"the space of {_show(path)} has the key {key!r}; keys must be strings")
    return [(key, key, space.spaces[key]) for key in sorted(space.spaces)]


def _show(path: Sequence[str]) -> str:
    return path[0] + "".join(f'["{name}"]' for name in path[1:])
