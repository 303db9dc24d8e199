"""Messages between clients elsewhere and a server: many requests, or replies, in one.

A message is the length of its header, four bytes; the header, a map of msgpack; and the bytes of its columns. What is
alike travels together: the tensors of one key of all rows are one column, aligned to 8 bytes. There is no pickle in it.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgpack
import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_non_tensor

from aioinfer.entries import Entries, is_checked, stack_entries
from aioinfer.errors import InvalidRequestError
from aioinfer.tensors import UnlikeRequestsError, entries, group_by_layout, rows, show_key, stack

__all__ = ["Group", "decode_message", "encode_message", "group_payloads"]

MAX_DIMENSIONS = 16

_LENGTH = struct.Struct("<I")
_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
_BFLOAT16 = "bfloat16"  # of which numpy knows nothing: it travels as the bits of int16
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Payload: TypeAlias = TensorDictBase | Entries
"""A request or a reply: a TensorDict, or entries by name."""
Path: TypeAlias = tuple[str, ...]
Leaf: TypeAlias = tuple[Path, str, tuple[int, ...]]
"""The key of a column, the name of its dtype, and the shape of a row of it."""


class Group(NamedTuple):
    """Payloads of like layout.

    Attributes:
        indices: which of those that were given they are.
        by_name: whether they are entries by name.
        batch_size: of one of them, if it is a TensorDict.
        leaves: their columns.
        columns: the arrays, each ``[k, *shape]``.
        plain: for each payload, what is no array: numbers, strings and lists, by path; ``None`` if there are none.
    """

    indices: Sequence[int]
    by_name: bool
    batch_size: tuple[int, ...]
    leaves: list[Leaf]
    columns: list[np.ndarray[Any, Any]]
    plain: list[list[tuple[Path, Any]]] | None


def group_payloads(payloads: Sequence[Payload]) -> list[Group]:
    """Put payloads of like layout together.

    Raises:
        InvalidRequestError: one of them has something that does not travel.
    """
    named: defaultdict[Any, list[int]] = defaultdict(list)
    tds: list[int] = []
    groups: list[Group] = []
    for index, payload in enumerate(payloads):
        if type(payload) is not dict:
            tds.append(index)
        elif is_checked(payload):
            named[tuple([(name, value.dtype, value.shape) for name, value in payload.items()])].append(index)
        else:
            groups.append(_group([index], payload, by_name=True))
    for indices in named.values():
        rows = [payloads[index] for index in indices]
        groups.append(_group(indices, stack_entries(rows, _ONE_ROW), by_name=True))  # type: ignore[arg-type]
    if tds:
        rows = [payloads[index] for index in tds]
        try:
            groups.append(_group(tds, stack(rows), by_name=False))  # type: ignore[arg-type]
        except (UnlikeRequestsError, RuntimeError):
            for found in group_by_layout(rows, [False] * len(rows)):  # type: ignore[arg-type]
                alike = stack([rows[index] for index in found])  # type: ignore[misc]
                groups.append(_group([tds[index] for index in found], alike, by_name=False))
    return groups


_ONE_ROW = torch.Size([])


def _group(indices: list[int], payload: Payload, *, by_name: bool) -> Group:
    leaves: list[Leaf] = []
    columns: list[np.ndarray[Any, Any]] = []
    plain: list[tuple[Path, Any]] = []
    _flatten(entries(payload) if isinstance(payload, TensorDictBase) else payload, (), leaves, columns, plain)
    if isinstance(payload, TensorDictBase):
        size = tuple(payload.batch_size[1:])
        leaves = [(path, name, shape[1:]) for path, name, shape in leaves]
        rows = [[(path, value[row]) for path, value in plain] for row in range(len(indices))] if plain else None
    else:
        size, rows = (), [plain] if plain else None
        columns = [column[None] for column in columns]
    return Group(indices, by_name, size, leaves, columns, rows)


def _flatten(
    payload: Mapping[str, Any],
    above: Path,
    leaves: list[Leaf],
    columns: list[np.ndarray[Any, Any]],
    plain: list[tuple[Path, Any]],
) -> None:
    for name, value in payload.items():
        path = (*above, name)
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu()
            if tensor.dtype is torch.bfloat16:
                leaves.append((path, _BFLOAT16, tuple(tensor.shape)))
                columns.append(tensor.view(torch.int16).numpy())
                continue
            value = tensor.numpy()
        if isinstance(value, np.ndarray):
            array = value.astype(value.dtype.newbyteorder("="), copy=False)
            dtype = _NAMES.get(array.dtype)
            if dtype is None:
                raise InvalidRequestError(f"{show_key(path)} has dtype {array.dtype}, which does not travel")
            leaves.append((path, dtype, array.shape))
            columns.append(array)
        elif is_non_tensor(value):
            plain.append((path, value.tolist()))
        elif isinstance(value, TensorDictBase | Mapping):
            _flatten(value, path, leaves, columns, plain)  # type: ignore[arg-type]
        else:
            plain.append((path, value))


def encode_message(header: dict[str, Any], groups: Sequence[tuple[dict[str, Any], Group]]) -> bytes:
    """Put a message together.

    Args:
        header: what there is beside groups.
        groups: each with what is to be said of it.

    Raises:
        InvalidRequestError: a plain value does not travel.
    """
    parts: list[Any] = [b"", b""]
    described: list[dict[str, Any]] = []
    for about, group in groups:
        described.append(
            {
                **about,
                "count": len(group.indices),
                "by_name": group.by_name,
                "batch_size": group.batch_size,
                "leaves": group.leaves,
                "plain": group.plain,
            }
        )
        for column in group.columns:
            if column.size:
                parts.append(np.ascontiguousarray(column))
                parts.append(bytes(-column.nbytes % 8))
    try:
        packed = msgpack.packb({**header, "groups": described})
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(f"an entry does not travel: {error}") from None
    parts[0] = _LENGTH.pack(len(packed))
    parts[1] = packed + bytes(-(len(packed) + _LENGTH.size) % 8)
    return b"".join(parts)


def decode_message(message: bytes) -> tuple[dict[str, Any], list[tuple[dict[str, Any], list[Payload]]]]:
    """Take a message of a stranger apart: its header, and the payloads of each group beside what is said of it.

    Arrays are read-only, and share the memory of the message.

    Raises:
        InvalidRequestError: it is malformed.
    """
    try:
        (length,) = _LENGTH.unpack_from(message)
        header = msgpack.unpackb(message[_LENGTH.size : _LENGTH.size + length])
        groups = header.pop("groups")
        position = _LENGTH.size + length + -(length + _LENGTH.size) % 8
        found = []
        for about in groups:
            payloads, position = _payloads(about, message, position)
            found.append((about, payloads))
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(f"the message is malformed: {type(error).__qualname__}: {error}") from None
    if position != len(message):
        raise InvalidRequestError(f"the message has {len(message)} bytes, {position} were expected")
    return header, found


def _payloads(about: dict[str, Any], message: bytes, position: int) -> tuple[list[Payload], int]:
    count, size, by_name = about["count"], about["batch_size"], about["by_name"]
    columns: list[tuple[Path, Any]] = []
    _check_shape([count, *size])
    for path, name, shape in about["leaves"]:
        _check_shape(shape)
        dtype = np.dtype(np.int16) if name == _BFLOAT16 else _DTYPES[name]
        nbytes = count * math.prod(shape) * dtype.itemsize
        if position + nbytes > len(message):
            raise InvalidRequestError("the message is cut short")
        array = np.ndarray((count, *shape), dtype, message, position)
        columns.append(
            (_path(path), array if name != _BFLOAT16 else torch.from_numpy(array.copy()).view(torch.bfloat16))
        )
        position += nbytes + -nbytes % 8
    plain = about["plain"]
    if plain is not None and len(plain) != count:
        raise InvalidRequestError("the message has another number of plain values")
    if not by_name and plain is None:  # most replies
        source: dict[str, Any] = {}
        for path, column in columns:
            _put(source, path, column)
        return list(rows(_as_td(source, torch.Size((count, *size))))), position
    payloads = [_entries(columns, index, () if plain is None else plain[index], by_name) for index in range(count)]
    return payloads if by_name else [_as_td(one, torch.Size(size)) for one in payloads], position


def _entries(columns: Sequence[tuple[Path, Any]], index: int, plain: Any, by_name: bool) -> Entries:
    made: Entries = {}
    for path, column in columns:
        _put(made, path, column[index])
    for path, value in plain:
        _put(made, _path(path), value if by_name else NonTensorData(value))
    return made


def _as_td(source: Entries, size: torch.Size) -> TensorDict:
    made = {
        name: torch.from_numpy(value.copy())
        if isinstance(value, np.ndarray)
        else _as_td(value, size)
        if isinstance(value, dict)
        else value
        for name, value in source.items()
    }
    return TensorDict(made, batch_size=size)


def _put(entries: dict[str, Any], path: Path, value: Any) -> None:
    for name in path[:-1]:
        entries = entries.setdefault(name, {})
    entries[path[-1]] = value


def _path(path: Any) -> Path:
    if not isinstance(path, list) or not path or not all(isinstance(name, str) for name in path):
        raise InvalidRequestError(f"a key is a list of strings, got {str(path)[:50]}")
    return tuple(path)


def _check_shape(shape: Any) -> None:
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise InvalidRequestError(f"there is no shape {str(shape)[:100]}")
