"""Messages between clients elsewhere and a server: many requests, or replies, in one.

A message is the length of its header, four bytes; the header, a map of msgpack; and the columns. Payloads of like
layout travel as one group: the tensors of one key of all of them are one column, little-endian, whose start is a
multiple of 8 bytes. There is no pickle in it, and each column has one of the dtypes that are named here.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgpack
import numpy as np
import torch
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
)

from aioinfer.entries import Entries, is_checked, stack_entries
from aioinfer.errors import InvalidRequestError
from aioinfer.tensors import UnlikeRequestsError, entries, group_by_layout, is_nested, rows, show_key, stack

__all__ = [
    "Group",
    "Payload",
    "check_payload",
    "columns_size",
    "decode_group",
    "decode_header",
    "encode_message",
    "group_payloads",
]

MAX_DIMENSIONS = 8
"""Of a tensor in a payload."""
MAX_DEPTH = 16
"""Of nested TensorDicts."""
MAX_COLUMNS = 1024
"""Of a group."""
MAX_HEADER = 4 * 2**20
"""Bytes: all but the tensors. A byte of msgpack may take 8 of memory."""

_LENGTH = struct.Struct("<I")
_BFLOAT16 = "bf2"  # of which numpy knows nothing: it travels as the bits of int16
_NAMES = {np.dtype(kind): np.dtype(kind).str[1:] for kind in "?bBhHiIlLqQefd"}
_WIRE_DTYPES = {name: np.dtype("<" + name) for name in _NAMES.values()} | {_BFLOAT16: np.dtype("<i2")}
_TORCH_DTYPES = {torch.from_numpy(np.empty(0, dtype)).dtype for dtype in _NAMES} | {torch.bfloat16}
_ONE_ROW = torch.Size([])
_ALWAYS_READABLE = (str, bool, int, float, type(None))

Payload: TypeAlias = TensorDictBase | Entries
"""A request or a reply: a TensorDict, or entries by name."""
Path: TypeAlias = tuple[str, ...]
Array: TypeAlias = np.ndarray[Any, Any]


class Group(NamedTuple):
    """Payloads of like layout.

    Attributes:
        indices: which of those that were given they are.
        by_name: whether they are entries by name.
        batch_size: of one of them, if it is a TensorDict.
        sizes: the batch sizes of TensorDicts in it, with their keys, where they are others.
        leaves: of each column the key, the name of its dtype, and the shape of a row.
        columns: the arrays, each ``[k, *shape]``.
        plain: for each payload, what is no tensor: its key, a number, text or list, and whether that is a list of one
            for each row; ``None`` if there is none.
    """

    indices: Sequence[int]
    by_name: bool
    batch_size: Sequence[int]
    sizes: Sequence[tuple[Path, Sequence[int]]]
    leaves: Sequence[tuple[Path, str, Sequence[int]]]
    columns: Sequence[Array]
    plain: Sequence[Sequence[tuple[Path, Any, bool]]] | None


# -- what travels ----------------------------------------------------------------------------------------------


def check_payload(payload: Payload) -> tuple[Payload, int]:
    """Return a payload as :func:`group_payloads` takes it, and how many bytes its tensors have.

    Raises:
        InvalidRequestError: it has something that does not travel.
    """
    if isinstance(payload, TensorDictBase) and not _is_plain_td(payload):
        try:
            _check_alike(payload)
            payload = payload.to_tensordict()
        except InvalidRequestError:
            raise
        except Exception as error:  # a class of the user's may raise anything
            raise InvalidRequestError(f"the request can't be copied: {type(error).__qualname__}: {error}") from error
    return payload, _check(payload, ())


def _is_plain_td(td: TensorDictBase) -> bool:
    return type(td) is TensorDict and all(_is_plain_td(value) for value in entries(td).values() if is_nested(value))


def _check_alike(td: TensorDictBase) -> None:
    """Refuse lazy stacks of rows that have entries of their own: a copy would not have these."""
    if isinstance(td, LazyStackedTensorDict):
        if len(group_by_layout(td.tensordicts, [False] * len(td.tensordicts))) > 1:
            raise InvalidRequestError("a lazy stack of unlike TensorDicts does not travel; ask for each of them")
    else:
        for value in entries(td).values():
            if is_nested(value):
                _check_alike(value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, TensorDictBase | Mapping) and not is_non_tensor(value)


def _check(payload: Payload, above: Path) -> int:
    size = 0
    if len(above) >= MAX_DEPTH:
        raise InvalidRequestError(f"{show_key(above[:4])} leads on: TensorDicts are nested {MAX_DEPTH} deep at most")
    for name, value in (entries(payload) if isinstance(payload, TensorDictBase) else payload).items():
        if isinstance(value, torch.Tensor):
            travels = value.dtype in _TORCH_DTYPES and value.layout is torch.strided
        elif isinstance(value, np.ndarray):
            travels = value.dtype in _NAMES
        elif _is_nested(value):
            size += _check(value, (*above, name))  # type: ignore[arg-type]
            continue
        else:
            size += len(_pack_plain((*above, name), value))
            continue
        if not travels:
            raise InvalidRequestError(f"{show_key((*above, name))} has dtype {value.dtype}, which does not travel")
        if value.ndim > MAX_DIMENSIONS:
            raise InvalidRequestError(
                f"{show_key((*above, name))} has {value.ndim} dimensions, at most {MAX_DIMENSIONS} travel"
            )
        size += value.nbytes
    return size


def _pack_plain(path: Path, value: Any) -> bytes:
    plain = _plain(value)
    try:
        packed: bytes = msgpack.packb(plain, default=_as_number)
        if type(plain) not in _ALWAYS_READABLE:
            msgpack.unpackb(packed)  # which refuses what some packed maps have for keys
    except Exception as error:  # whatever the value's own methods raise
        raise InvalidRequestError(f"{show_key(path)} does not travel: {error}") from error
    if len(packed) > MAX_HEADER // 2:
        raise InvalidRequestError(f"{show_key(path)} takes {len(packed)} bytes as a list or text; make it an array")
    return packed


def _plain(value: Any) -> Any:
    """What is packed of an entry that is no tensor."""
    if isinstance(value, NonTensorData):
        return value.data
    return value.tolist() if is_non_tensor(value) else value


def _as_number(value: Any) -> Any:
    """A number in a list that is one of numpy or torch."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value.item()


# -- encoding --------------------------------------------------------------------------------------------------


def group_payloads(payloads: Sequence[Payload]) -> list[Group]:
    """Put payloads that :func:`check_payload` has returned together, those of like layout into one group."""
    named: list[int] = []
    tds: list[int] = []
    groups: list[Group] = []
    for index, payload in enumerate(payloads):
        if type(payload) is not dict:
            tds.append(index)
        elif is_checked(payload):
            named.append(index)
        else:
            groups.append(_group([index], payload, by_name=True))
    with torch.no_grad():
        if named:
            groups += _named_groups(payloads, named)
        if tds:
            groups += _td_groups(payloads, tds)
    return groups


def _named_groups(payloads: Sequence[Any], indices: list[int]) -> list[Group]:
    try:
        return [_group(indices, stack_entries([payloads[index] for index in indices], _ONE_ROW), by_name=True)]
    except (UnlikeRequestsError, RuntimeError):
        alike: defaultdict[Any, list[int]] = defaultdict(list)
        for index in indices:
            layout = [(name, str(value.dtype), tuple(value.shape)) for name, value in payloads[index].items()]
            alike[tuple(sorted(layout))].append(index)
        return [
            _group(some, stack_entries([payloads[index] for index in some], _ONE_ROW), by_name=True)
            for some in alike.values()
        ]


def _td_groups(payloads: Sequence[Any], indices: list[int]) -> list[Group]:
    tds = [payloads[index] for index in indices]
    try:
        return [_group(indices, stack(tds), by_name=False)]
    except (UnlikeRequestsError, RuntimeError):
        return [
            _group([indices[one] for one in some], stack([tds[one] for one in some]), by_name=False)
            for some in group_by_layout(tds, [False] * len(tds))
        ]


class _Flat:
    """The entries of a payload, or of stacked ones, with their whole keys.

    Args:
        stacked: whether each has a first dimension for payloads.
        size: the batch size that nested TensorDicts have if nothing else is said.
    """

    def __init__(self, stacked: bool, size: Sequence[int]) -> None:
        self._first = 1 if stacked else 0
        self._size = tuple(size)
        self.sizes: list[tuple[Path, Sequence[int]]] = []
        self.leaves: list[tuple[Path, str, Sequence[int]]] = []
        self.columns: list[Array] = []
        self.plain: list[tuple[Path, Any]] = []

    def add(self, payload: Payload, above: Path = ()) -> None:
        for name, value in (entries(payload) if isinstance(payload, TensorDictBase) else payload).items():
            path = (*above, name)
            if isinstance(value, torch.Tensor):
                if value.dtype is torch.bfloat16:
                    self._add_column(path, value.view(torch.int16).numpy(force=True), _BFLOAT16)
                else:
                    self._add_column(path, value.numpy(force=True))
            elif isinstance(value, np.ndarray):
                self._add_column(path, value)
            elif _is_nested(value):
                size = tuple(value.batch_size[self._first :]) if isinstance(value, TensorDictBase) else None
                if size is not None and (size != self._size or not len(value.keys())):
                    self.sizes.append((path, size))
                self.add(value, path)  # type: ignore[arg-type]
            else:
                self.plain.append((path, value))

    def _add_column(self, path: Path, array: Array, name: str = "") -> None:
        name = name or _NAMES[array.dtype]
        if array.ndim - self._first > MAX_DIMENSIONS or len(self.columns) == MAX_COLUMNS:
            raise InvalidRequestError(f"more than {MAX_DIMENSIONS} dimensions, or {MAX_COLUMNS} tensors, do not travel")
        self.leaves.append((path, name, array.shape[self._first :]))
        self.columns.append(array if self._first else array[None])


def _group(indices: Sequence[int], payload: Payload, *, by_name: bool) -> Group:
    """Make a group of stacked payloads, or of one that is not stacked."""
    stacked = isinstance(payload, TensorDictBase)
    size = tuple(payload.batch_size[1:]) if isinstance(payload, TensorDictBase) else ()
    flat = _Flat(stacked, size)
    flat.add(payload)
    plain: list[list[tuple[Path, Any, bool]]] | None = None
    if flat.plain:
        plain = [
            [_packable(path, value[row] if stacked else value) for path, value in flat.plain]
            for row in range(len(indices))
        ]
    return Group(indices, by_name, size, flat.sizes, flat.leaves, flat.columns, plain)


def _packable(path: Path, value: Any) -> tuple[Path, Any, bool]:
    _pack_plain(path, value)
    return path, _plain(value), is_non_tensor(value) and not isinstance(value, NonTensorData)


def encode_message(header: Mapping[str, Any], groups: Sequence[tuple[Mapping[str, Any], Group]] = ()) -> bytes:
    """Put a message together.

    Args:
        header: what there is beside groups.
        groups: each with what is to be said of it: at least ``numbers``, one for each payload.

    Raises:
        Exception: a payload does not travel.
    """
    parts: list[Any] = [b"", b""]
    described: list[dict[str, Any]] = []
    for about, group in groups:
        described.append(
            {
                **about,
                "by_name": group.by_name,
                "batch_size": group.batch_size,
                "sizes": group.sizes,
                "leaves": group.leaves,
                "plain": group.plain,
            }
        )
        for (_, name, _), column in zip(group.leaves, group.columns, strict=True):
            if column.size:
                parts.append(np.ascontiguousarray(column, _WIRE_DTYPES[name]).data.cast("B"))
                parts.append(bytes(-column.nbytes % 8))
    packed = msgpack.packb({**header, "groups": described}, default=_as_number)
    if len(packed) > MAX_HEADER:
        raise InvalidRequestError(f"{len(packed)} bytes of lists and texts do not travel; make them arrays")
    parts[0] = _LENGTH.pack(len(packed))
    parts[1] = packed + bytes(-(len(packed) + _LENGTH.size) % 8)
    return b"".join(parts)


# -- decoding --------------------------------------------------------------------------------------------------


def decode_header(message: bytes) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Read the header of a stranger's message.

    Returns:
        It, what is said of each group, and where the columns of the first one begin. All groups together have at most
        as many payloads as the message has bytes.

    Raises:
        InvalidRequestError: it is malformed.
    """
    try:
        (length,) = _LENGTH.unpack_from(message)
        if length > MAX_HEADER or _LENGTH.size + length > len(message):
            raise InvalidRequestError(f"the message is malformed: a header of {length} bytes in {len(message)}")
        header = msgpack.unpackb(memoryview(message)[_LENGTH.size : _LENGTH.size + length])
        groups = header.pop("groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise InvalidRequestError("the message is malformed: its groups are no list of maps")
        for group in groups:
            check_numbers(group["numbers"])
    except InvalidRequestError:
        raise
    except Exception as error:  # of msgpack, or of what is not there
        raise _malformed(error) from None
    return header, groups, _LENGTH.size + length + -(length + _LENGTH.size) % 8


def check_numbers(numbers: Any) -> None:
    """Raise :class:`InvalidRequestError` unless these are numbers of requests, each of them once."""
    if (
        not isinstance(numbers, list)
        or not all([type(number) is int and 0 <= number < 2**63 for number in numbers])  # noqa: C419 - faster
        or len(set(numbers)) != len(numbers)
    ):
        raise InvalidRequestError("the message is malformed: the numbers of its requests are not one for each")


def decode_group(about: Mapping[str, Any], message: bytes, position: int) -> tuple[list[Payload], int]:
    """Read the payloads of a group of a stranger's message.

    Arrays of entries by name are read-only, and share the memory of the message; other tensors are copies.

    Args:
        about: as :func:`decode_header` returned it.
        message: all of it.
        position: where the columns of the group begin.

    Returns:
        The payloads, and where the columns of the next group begin.

    Raises:
        InvalidRequestError: it is malformed.
    """
    try:
        return _decode_group(about, message, position)
    except InvalidRequestError:
        raise
    except Exception as error:  # of a header that does not say what it should
        raise _malformed(error) from None


def columns_size(about: Mapping[str, Any]) -> int:
    """How many bytes the columns take of a group that :func:`decode_group` has refused, for those behind it.

    Raises:
        InvalidRequestError: that is not known.
    """
    try:
        count = len(about["numbers"])
        sizes = [math.prod(shape) * count * _WIRE_DTYPES[name].itemsize for _, name, shape in about["leaves"]]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("a shape is none")
    except Exception as error:
        raise _malformed(error) from None
    return sum([size + -size % 8 for size in sizes])


def _malformed(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"the message is malformed: {type(error).__qualname__}: {str(error)[:200]}")


def _decode_group(about: Mapping[str, Any], message: bytes, position: int) -> tuple[list[Payload], int]:
    count, by_name, plain = len(about["numbers"]), about["by_name"] is True, about["plain"]
    size = _shape(about["batch_size"], message)
    if count * math.prod(size) > len(message):  # rows without elements: nothing else bounds them
        raise InvalidRequestError("the message is malformed: it has more rows than bytes")
    if len(about["leaves"]) + len(about["sizes"]) > MAX_COLUMNS or (plain is not None and len(plain) != count):
        raise InvalidRequestError("the message is malformed: it has too many columns, or other plain values")
    sizes = {_path(path): _shape(own, message) for path, own in about["sizes"]}
    paths: list[Path] = []
    columns: list[Any] = []
    for path, name, shape in about["leaves"]:
        dtype = _WIRE_DTYPES[name]
        full = (count, *_shape(shape, message))
        nbytes = math.prod(full) * dtype.itemsize
        if position + nbytes > len(message):
            raise InvalidRequestError("the message is malformed: it is cut short")
        column: Any = np.ndarray(full, dtype, message, position if nbytes else 0)
        paths.append(_path(path))
        columns.append(torch.from_numpy(column.copy()).view(torch.bfloat16) if name == _BFLOAT16 else column)
        position += nbytes + -nbytes % 8
    if not by_name and plain is None:  # most replies
        stacked = _nest(zip(paths, columns, strict=True), sizes)
        return list(rows(_as_td(stacked, (count, *size), sizes, (count,)))), position
    if by_name and plain is None and not sizes and all([len(path) == 1 for path in paths]):  # most requests  # noqa: C419
        names = [path[0] for path in paths]
        return [dict(zip(names, values, strict=True)) for values in _rows(columns, count)], position
    found: list[Payload] = []
    for index, values in enumerate(_rows(columns, count)):
        own = list(zip(paths, values, strict=True))
        if plain is not None:
            own += [(_path(path), _entry(value, by_name, several)) for path, value, several in plain[index]]
        nested = _nest(own, sizes)
        found.append(_as_entries(nested, sizes) if by_name else _as_td(nested, size, sizes))
    return found, position


def _rows(columns: Sequence[Any], count: int) -> Sequence[Sequence[Any]]:
    """For each row, its part of each column, which is an array also where it is a number."""
    if not columns:
        return [()] * count
    parts = [list(column) if column.ndim > 1 else [column[index, ...] for index in range(count)] for column in columns]
    return list(zip(*parts, strict=True))


def _nest(flat: Iterable[tuple[Path, Any]], sizes: Iterable[Path]) -> dict[str, Any]:
    """Put values that are named by their whole keys into maps of maps, also where a map has no value."""
    nested: dict[str, Any] = {}
    for path in sizes:
        _inner(nested, path)
    for path, value in flat:
        _inner(nested, path[:-1])[path[-1]] = value
    return nested


def _inner(nested: dict[str, Any], path: Path) -> dict[str, Any]:
    for name in path:
        nested = nested.setdefault(name, {})
        if type(nested) is not dict:
            raise InvalidRequestError(f"the message is malformed: {show_key(path[:4])} is no map")
    return nested


def _entry(value: Any, by_name: bool, several: bool) -> Any:
    """The entry of a payload that is no tensor."""
    if several:
        return NonTensorStack.from_list(value)
    return value if by_name else NonTensorData(value)


def _as_td(
    nested: dict[str, Any],
    size: tuple[int, ...],
    sizes: Mapping[Path, tuple[int, ...]],
    first: tuple[int, ...] = (),
    above: Path = (),
) -> TensorDict:
    made: dict[str, Any] = {}
    for name, value in nested.items():
        if type(value) is dict:
            path = (*above, name)
            own = (*first, *sizes[path]) if path in sizes else size
            made[name] = _as_td(value, own, sizes, first, path)
        else:
            made[name] = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
    return TensorDict(made, batch_size=size)


def _as_entries(nested: dict[str, Any], sizes: Mapping[Path, tuple[int, ...]], above: Path = ()) -> Entries:
    """Entries by name, of which those that were TensorDicts are some again."""
    if not sizes:
        return nested
    made: Entries = {}
    for name, value in nested.items():
        path = (*above, name)
        if path in sizes:
            made[name] = _as_td(value, sizes[path], sizes, (), path)
        else:
            made[name] = _as_entries(value, sizes, path) if type(value) is dict else value
    return made


def _path(path: Any) -> Path:
    if not isinstance(path, list) or not 0 < len(path) <= MAX_DEPTH or not all(isinstance(name, str) for name in path):
        raise InvalidRequestError(f"the message is malformed: there is no key {str(path)[:50]}")
    return tuple(path)


def _shape(shape: Any, message: bytes) -> tuple[int, ...]:
    """A shape, of which no dimension is larger than the message, also where there are no elements."""
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= len(message) for size in shape):
        raise InvalidRequestError(f"the message is malformed: there is no shape {str(shape)[:50]}")
    return tuple(shape)
