"""TensorDicts of one layout as rows of contiguous columns: copied in and out one by one, or many at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from copy import copy
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import numpy as np  # tensordict requires it
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aioinfer.entries import Entries, array_dtype, as_array, check_entries, make_td, row_count
from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.modes import long_lived
from aioinfer.tensors import OWN_MEMORY_BYTES, Allocate, build, entries, is_nested, show_key, unbind_rows

__all__ = ["LeafSpec", "RowBlock", "RowLayout", "RowTable", "Value"]

Path: TypeAlias = tuple[str, ...]
Value: TypeAlias = Tensor | np.ndarray[Any, Any]
"""What is copied to a row."""

_ALIGNMENT = 64
_STRIDED = torch.strided
_ONE_ROW = torch.Size([])
# torch has no indexed copies of the first of these; their bits are copied as those of the second.
_COPIED_AS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
# So many small rows are stacked first and copied with one call: 16 of 256 bytes take 10 us instead of 18, 64 take 21
# instead of 72.
_MANY = 8


class LeafSpec:
    """One tensor of each row."""

    __slots__ = ("dtype", "key", "name", "nbytes", "path", "shape")

    def __init__(self, path: Path, shape: torch.Size, dtype: torch.dtype) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.key: NestedKey = path[0] if len(path) == 1 else path
        self.name = show_key(self.key)


class RowBlock(NamedTuple):
    """What a TensorDict ``[n, *batch_size]`` of several rows holds.

    Attributes:
        rows: ``n``, which may be 0.
        values: its tensors, each ``[n, *shape]``, in the order of the layout's ``leaves``.
    """

    rows: int
    values: Sequence[Tensor]


class RowLayout:
    """The layout of a row: taken from an example, checked against what a caller or a model hands in. It pickles.

    Args:
        example: a TensorDict shaped as one row is; its values don't matter.
        what: what messages call it.
        drop_undeclared: leave entries out that the example does not have, instead of refusing them.
        rows: most rows that a caller may hand in at a time.

    Raises:
        TypeError: ``example`` is no TensorDict, or has entries that are no plain tensors.
    """

    def __init__(self, example: TensorDictBase, what: str, *, drop_undeclared: bool = False, rows: int = 1) -> None:
        if not isinstance(example, TensorDictBase):
            raise TypeError(f"{what}_spec must be a TensorDict, got {type(example).__qualname__}")
        self.what = what
        self.batch_size = example.batch_size
        self.drop_undeclared = drop_undeclared
        self.rows = rows
        self.leaves: list[LeafSpec] = []
        self.sizes: dict[Path, torch.Size] = {(): example.batch_size}
        self._read(example, ())
        self._left_out: frozenset[str] = frozenset()
        self._take(self.leaves)

    def _take(self, leaves: list[LeafSpec]) -> None:
        self.leaves = leaves
        self._is_flat = all(len(leaf.path) == 1 for leaf in self.leaves)
        self.is_simple = self._is_flat and len(self.sizes) == 1
        self._names: list[Any] = (
            [leaf.path[0] for leaf in self.leaves] if self._is_flat else [leaf.path for leaf in self.leaves]
        )
        self._declared = {leaf.path[0] for leaf in self.leaves}
        self._expected = [(name, leaf.dtype, leaf.shape) for name, leaf in zip(self._names, self.leaves, strict=True)]
        self._array_dtypes = [array_dtype(leaf.dtype) for leaf in self.leaves]
        self._dtypes = {leaf.key: leaf.dtype for leaf in self.leaves}
        self._shapes = {leaf.key: leaf.shape for leaf in self.leaves}

    def _read(self, td: TensorDictBase, above: Path) -> None:
        for key, value in td.items():
            path = (*above, str(key))
            if is_nested(value):
                self.sizes[path] = value.batch_size
                self._read(value, path)
            elif isinstance(value, Tensor) and (kind := _odd_kind(value)):
                raise TypeError(f"{self.what}_spec has {path[-1]!r}, which is {kind}; expected a plain tensor")
            elif isinstance(value, Tensor):
                self.leaves.append(LeafSpec(path, value.shape, value.dtype))
            else:
                raise TypeError(
                    f"{self.what}_spec has {path[-1]!r} of type {type(value).__qualname__}; "
                    "only tensors have a place in shared memory (MPTransport carries anything)"
                )

    def without(self, key: str) -> RowLayout:
        """The same, but for one entry, declared or not; a batch may have it."""
        other = copy(self)
        other._left_out = frozenset([key])
        other._take([leaf for leaf in self.leaves if leaf.path != (key,)])
        return other

    @long_lived()
    def example(self) -> TensorDict:
        """A row of zeros."""
        return self.assemble([torch.zeros(leaf.shape, dtype=leaf.dtype) for leaf in self.leaves], _ONE_ROW)

    def signature(self) -> str:
        """The layout in words; equal for equal layouts."""
        leaves = ", ".join(f"{leaf.name} {leaf.dtype} {list(leaf.shape)}" for leaf in self.leaves)
        sizes = ", ".join(f"{path} {list(size)}" for path, size in self.sizes.items() if path)
        return f"{self.what} {list(self.batch_size)} of {leaves}" + (f" in {sizes}" if sizes else "")

    def values(self, td: TensorDictBase | Entries) -> list[Value] | RowBlock:
        """The tensors of ``td`` in the order of ``leaves``: of one row ``[*batch_size]``, or of ``[n, *batch_size]``.

        Arrays among entries by name stay arrays in one row.

        Raises:
            InvalidRequestError: its layout is another one, or it has too many rows; the message names key, found and
                expected.
        """
        if type(td) is dict:
            return self._entry_values(td)
        if (type(td) is TensorDict or isinstance(td, TensorDictBase)) and td.batch_size == self.batch_size:
            found: dict[Any, Any] = entries(td) if self._is_flat else _flat(td)
            values: list[Value] = []
            try:
                for name, dtype, shape in self._expected:
                    value = found[name]
                    if value.layout is not _STRIDED or value.dtype is not dtype or not value.is_cpu:
                        break
                    if value.shape != shape:  # which a nested tensor can't tell
                        break
                    values.append(value)
                else:
                    if len(found) == len(values) or self.drop_undeclared:
                        return values
            except (KeyError, AttributeError, RuntimeError):  # one is not there, or no tensor, or a nested one
                pass
        elif isinstance(td, TensorDictBase) and td.batch_dims and td.batch_size[1:] == self.batch_size:
            return self._block(td)
        raise InvalidRequestError(self._mismatch(td))

    def _entry_values(self, entries: Entries) -> list[Value] | RowBlock:
        values: list[Value] = []
        if self.is_simple:
            for (name, dtype, shape), of_arrays in zip(self._expected, self._array_dtypes, strict=True):
                value = entries.get(name)
                if type(value) is np.ndarray:
                    if of_arrays is None or value.dtype != of_arrays or value.shape != shape:  # None equals float64
                        break
                elif (
                    type(value) is not Tensor
                    or value.dtype is not dtype
                    or value.shape != shape
                    or not value.is_cpu
                    or value.layout is not _STRIDED
                ):
                    break
                values.append(value)
            else:
                if len(entries) == len(values) or self.drop_undeclared:
                    return values
        if self.drop_undeclared:
            entries = {name: value for name, value in entries.items() if name in self._declared}
        if entries or not self.drop_undeclared:
            check_entries(entries, self._dtypes)
        rows = row_count(entries, self._shapes)
        size = self.batch_size if rows is None else torch.Size((rows, *self.batch_size))
        return self.values(make_td(entries, size))

    def _block(self, td: TensorDictBase) -> RowBlock:
        count = td.batch_size[0]
        found: dict[Any, Any] = entries(td) if self._is_flat else _flat(td)
        values: list[Tensor] = []
        try:
            for name, dtype, shape in self._expected:
                value = found[name]
                if value.layout is not _STRIDED or value.dtype is not dtype or not value.is_cpu:
                    break
                if value.shape[:1] != (count,) or value.shape[1:] != shape:
                    break
                values.append(value)
        except (KeyError, AttributeError, RuntimeError):  # as in `values`
            pass
        if len(values) < len(self._expected) or (len(found) > len(values) and not self.drop_undeclared):
            raise InvalidRequestError(self._mismatch(td, rows=td.batch_size[:1]))
        if count > self.rows:
            raise InvalidRequestError(
                f"the {self.what} has {count} rows, this transport takes at most {self.rows} in one {self.what}; "
                f"send fewer at a time, or make the ProcessSlotTransport with rows={count}"
            )
        return RowBlock(count, values)

    def batch_values(self, output: TensorDictBase, keys: Set[str] | None) -> list[Tensor]:
        """The tensors ``[B, *shape]`` of a batch of rows, on the CPU, in the order of ``leaves``.

        Args:
            output: ``[B, ...]``, what a model returned.
            keys: its entries that count; ``None``: all.

        Raises:
            ModelError: its rows have another layout; the message names key, found and expected.
        """
        if self._is_flat and keys is not None and keys <= self._declared:
            found: dict[Any, Any] = entries(output)  # whatever else it has is no part of the reply
        else:
            own = self._own(output, keys)
            found = own if self._is_flat else _flat(build(own, output.batch_size, None))
            if not self.drop_undeclared and len(found) != len(self.leaves):
                raise self._unfit(output, keys)
        values: list[Tensor] = []
        for name, dtype, shape in self._expected:
            value = found.get(name)
            if not isinstance(value, Tensor) or value.layout is not _STRIDED:
                raise self._unfit(output, keys)
            if value.dtype is not dtype or value.shape[1:] != shape:
                raise self._unfit(output, keys)
            values.append(value if value.is_cpu else value.cpu())
        return values

    def _own(self, output: TensorDictBase, keys: Set[str] | None) -> dict[str, Any]:
        return {
            key: value for key, value in output.items() if (keys is None or key in keys) and key not in self._left_out
        }

    def _unfit(self, output: TensorDictBase, keys: Set[str] | None) -> ModelError:
        own = self._own(output, keys)
        return ModelError(self._mismatch(build(own, output.batch_size, None)[0].to("cpu"), batch_size=False))

    def _mismatch(self, td: Any, *, batch_size: bool = True, rows: Sequence[int] = ()) -> str:
        if not isinstance(td, TensorDictBase):
            return f"a {self.what} must be a TensorDict, a mapping, or entries by name, got {type(td).__qualname__}"
        if batch_size and list(td.batch_size) != [*rows, *self.batch_size]:
            several = ", ".join(map(str, ["n", *self.batch_size]))
            return (
                f"the {self.what} has batch size {list(td.batch_size)}, expected {list(self.batch_size)}, "
                f"or [{several}] for n rows"
            )
        found = _flat(td)
        missing = [leaf.name for leaf in self.leaves if leaf.path not in found]
        declared = {leaf.path for leaf in self.leaves}
        unknown = [LeafSpec(path, torch.Size(), torch.uint8).name for path in found if path not in declared]
        expected = ", ".join(leaf.name for leaf in self.leaves)
        if missing:
            return f"the {self.what} lacks {', '.join(missing)}; expected {expected}"
        if unknown and not self.drop_undeclared:
            return f"the {self.what} has undeclared {', '.join(unknown)}; expected {expected}"
        for leaf in self.leaves:
            value = found[leaf.path]
            if not isinstance(value, Tensor):
                return f"{leaf.name} of the {self.what} is a {type(value).__qualname__}, expected a tensor"
            if kind := _odd_kind(value):
                return f"{leaf.name} of the {self.what} is {kind}, expected a plain tensor"
            if list(value.shape) != [*rows, *leaf.shape]:
                return f"{leaf.name} of the {self.what} has shape {list(value.shape)}, expected {[*rows, *leaf.shape]}"
            if value.dtype != leaf.dtype:
                return f"{leaf.name} of the {self.what} has dtype {value.dtype}, expected {leaf.dtype}"
            if value.device.type != "cpu":
                return f"{leaf.name} of the {self.what} is on device {value.device}, expected cpu"
        return f"the {self.what} does not fit"

    def tree(self, values: Iterable[Any], rows: torch.Size = _ONE_ROW) -> dict[str, Any]:
        """The nested entries of a TensorDict ``[*rows, *batch_size]`` with these leaves."""
        return self._nest(values, rows)

    def assemble(self, values: Iterable[Any], rows: torch.Size) -> TensorDict:
        """Build a TensorDict ``[*rows, *batch_size]`` of its leaves, without a check."""
        return build(self._nest(values, rows), torch.Size((*rows, *self.batch_size)), None)

    def _nest(self, values: Iterable[Any], rows: torch.Size) -> dict[str, Any]:
        if self.is_simple:
            return dict(zip(self._names, values))  # noqa: B905 - a third of the time
        nodes: dict[Path, dict[str, Any]] = {path: {} for path in self.sizes}
        for leaf, value in zip(self.leaves, values, strict=True):
            nodes[leaf.path[:-1]][leaf.path[-1]] = value
        for path in sorted(self.sizes, key=len, reverse=True)[:-1]:  # the root comes last
            nodes[path[:-1]][path[-1]] = build(nodes[path], torch.Size((*rows, *self.sizes[path])), None)
        return nodes[()]


def _odd_kind(value: Tensor) -> str:
    """In a word, why a tensor can't be copied to a row; empty if it can."""
    if value.is_nested:
        return "nested"
    if value.layout is not _STRIDED:
        return str(value.layout)
    return "quantised" if value.is_quantized else ""


def _flat(td: TensorDictBase, above: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for key, value in td.items():
        if is_nested(value):
            found.update(_flat(value, (*above, str(key))))
        else:
            found[(*above, str(key))] = value
    return found


Rows: TypeAlias = Tensor | range
"""Numbers of rows: ``[B]``, or those that follow each other."""


class RowTable:
    """Rows of like layout in one piece of memory, one contiguous column ``[rows, *shape]`` for each leaf.

    Several rows that follow each other make a place, as many as the layout says. What is written and read by place is
    the first row of each, or a block of its first rows.

    It knows nothing of who may touch which row when; that is its user's to order.

    Args:
        layout: of a row.
        count: how many places.
        memory: at least ``nbytes(layout, count)`` bytes, ``[nbytes]``.
        index: makes a tensor of the numbers of places, which must be usable under any mode of torch.
    """

    @long_lived()
    def __init__(self, layout: RowLayout, count: int, memory: Tensor, index: Callable[[Sequence[int]], Tensor]) -> None:
        self.layout = layout
        self._count = count
        self._index = index
        self._columns: list[Tensor] = []
        rows = count * layout.rows
        for leaf, start in zip(layout.leaves, _starts(layout, count), strict=False):
            piece = memory[start : start + rows * leaf.nbytes]
            self._columns.append(piece.view(leaf.dtype).view(rows, *leaf.shape))
        self._take_apart()

    def _take_apart(self) -> None:
        self._first_rows = [column[:: self.layout.rows] for column in self._columns]
        self._arrays: list[Any] = [as_array(column) for column in self._first_rows]
        rows = zip(*[column.unbind(0) for column in self._first_rows], strict=True)
        self._rows: list[tuple[Tensor, ...]] = [tuple(row) for row in rows] or [()] * self._count

    def without(self, key: str) -> RowTable:
        """The same rows, but for one entry."""
        other = copy(self)
        other.layout = self.layout.without(key)
        kept = [leaf.path != (key,) for leaf in self.layout.leaves]
        other._columns = list(compress(self._columns, kept))
        with long_lived():
            other._take_apart()
        return other

    @staticmethod
    def nbytes(layout: RowLayout, count: int) -> int:
        """How much memory ``count`` places take."""
        return list(_starts(layout, count))[-1]

    def write_one(self, place: int, values: Sequence[Value]) -> None:
        """Copy what ``layout.values`` returned for one row into the first row of a place."""
        places = self._rows[place]
        for number, value in enumerate(values):
            if isinstance(value, np.ndarray):
                self._arrays[number][place] = value
            else:
                places[number].copy_(value.detach() if value.requires_grad else value)

    def write(self, places: Sequence[int], requests: Sequence[Sequence[Value]]) -> None:
        """Do as :meth:`write_one` with several."""
        if len(places) < _MANY:
            for place, values in zip(places, requests, strict=True):
                self.write_one(place, values)
            return
        index = self._index(places)
        columns = zip(self.layout.leaves, self._first_rows, self._arrays, zip(*requests, strict=True), strict=True)
        for leaf, column, array, values in columns:
            if np.ndarray in map(type, values):
                for place, value in zip(places, values, strict=True):
                    if type(value) is np.ndarray:
                        array[place] = value
                    else:
                        column[place].copy_(value.detach())
            elif leaf.nbytes < OWN_MEMORY_BYTES:
                _index_copy(column, index, torch.stack(values).detach())
            else:
                for place, value in zip(places, values, strict=True):
                    column[place].copy_(value.detach())

    def read(self, place: int) -> dict[str, Any]:
        """Copy the entries of the first row of a place."""
        return self.layout.tree([value.clone() for value in self._rows[place]])

    def view(self, place: int) -> dict[str, Any]:
        """The entries of the first row of a place as they lie in memory."""
        return self.layout.tree(self._rows[place])

    def read_many(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Copy the entries of several first rows; those of a leaf below 1 KiB are parts of one allocation."""
        index = self._index(places)
        columns = [
            unbind_rows(column.index_select(0, index))
            if leaf.nbytes < OWN_MEMORY_BYTES
            else [column[place].clone() for place in places]
            for leaf, column in zip(self.layout.leaves, self._first_rows, strict=True)
        ]
        if self.layout.is_simple and len(columns) == 1:  # for speed
            name = self.layout.leaves[0].path[0]
            return [{name: value} for value in columns[0]]
        return [self.layout.tree(values) for values in (zip(*columns, strict=True) if columns else [()] * len(places))]

    def block(self, rows: range) -> Sequence[Tensor]:
        """The tensors of rows that follow each other as they lie in memory, each ``[len(rows), *shape]``."""
        return [column[rows.start : rows.stop] for column in self._columns]

    def td(self, rows: int | range) -> TensorDict:
        """A row as it lies in memory; or rows that follow each other, ``[len(rows), *batch_size]``."""
        if isinstance(rows, int):
            return self.layout.assemble([column[rows] for column in self._columns], _ONE_ROW)
        return self.layout.assemble(self.block(rows), torch.Size([len(rows)]))

    def gather(self, rows: Rows, allocate: Allocate | None) -> TensorDict:
        """Copy rows into a batch ``[B, *batch_size]``.

        Args:
            rows: their numbers.
            allocate: makes the memory, given shape and dtype.
        """
        if isinstance(rows, range):
            count = len(rows)
            values = [_cloned(block, allocate) for block in self.block(rows)]
        else:
            count = rows.numel()
            if allocate is None:
                values = [column.index_select(0, rows) for column in self._columns]
            else:
                values = [
                    torch.index_select(column, 0, rows, out=allocate((count, *column.shape[1:]), column.dtype))
                    for column in self._columns
                ]
        return self.layout.assemble(values, torch.Size([count]))

    def scatter(self, rows: Rows, values: Sequence[Tensor]) -> None:
        """Copy the rows of a batch's leaves, each ``[B, *shape]``, to where they belong."""
        if isinstance(rows, range):
            for block, value in zip(self.block(rows), values, strict=True):
                block.copy_(value)
            return
        for column, value in zip(self._columns, values, strict=True):
            _index_copy(column, rows, value)


def _index_copy(column: Tensor, rows: Tensor, values: Tensor) -> None:
    if (dtype := _COPIED_AS.get(column.dtype)) is not None:
        column, values = column.view(dtype), values.view(dtype)
    column.index_copy_(0, rows, values)


def _cloned(block: Tensor, allocate: Allocate | None) -> Tensor:
    return block.clone() if allocate is None else allocate(tuple(block.shape), block.dtype).copy_(block)


def _starts(layout: RowLayout, count: int) -> Iterator[int]:
    """Where each leaf's column begins, and at last where the memory ends."""
    start = 0
    for leaf in layout.leaves:
        yield start
        start += -(-count * layout.rows * leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
    yield start
