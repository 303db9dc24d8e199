"""Messages with arrays in them: msgpack, in which an array is a map, as the clients of openpi write it.

An array is ``{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}``, a numpy scalar
``{b"__npgeneric__": True, b"data": value, b"dtype": "<f4"}``; some clients have strings as keys. What comes from the
network is checked before it becomes an array: an array over the bytes of a stranger with a dtype of his choice can end
the process.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import msgpack
import numpy as np

from aioinfer.errors import InvalidRequestError

__all__ = ["MAX_DIMENSIONS", "MAX_NESTING", "packb", "unpackb"]

MAX_DIMENSIONS = 8
"""Of an array in a message, at most."""
MAX_NESTING = 32
"""Of maps and lists in a message, at most: code that follows them calls itself."""

_CONTAINERS = (dict, list)
_own = threading.local()  # a packer for each thread, as its buffer takes longer to allocate than a reply to pack

_DTYPES = {
    name: dtype.newbyteorder("=")
    for dtype in map(np.dtype, ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
    for name in (dtype.str, dtype.name)
}
_BIG_ENDIAN = {dtype.newbyteorder(">").str: dtype for dtype in _DTYPES.values() if dtype.itemsize > 1}
"""By the names that numpy has for them: bool, integers and floating point numbers, in both byte orders."""


def packb(value: Any) -> bytes:
    """Pack maps, lists, arrays, numbers, strings and bytes.

    Raises:
        TypeError: there is something else in it.
    """
    try:
        packer = _own.packer
    except AttributeError:
        packer = _own.packer = msgpack.Packer(default=_pack)
    packed: bytes = packer.pack(value)
    return packed


def _pack(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"messages carry no {type(value).__qualname__}")


def unpackb(message: bytes) -> Any:
    """Unpack a message of a stranger. Its arrays are read-only, and share its memory.

    Raises:
        InvalidRequestError: it is malformed, or has arrays that are no bool, integers or floating point numbers.
    """
    try:
        value = msgpack.unpackb(message, object_hook=_unpack)
    except InvalidRequestError:
        raise
    except Exception as error:  # msgpack has several kinds, also ValueError and UnicodeDecodeError
        raise InvalidRequestError(f"the message is no msgpack: {type(error).__qualname__}: {error}"[:300]) from None
    _check_nesting(value, MAX_NESTING)
    return value


def _check_nesting(value: Any, left: int) -> None:
    if type(value) is dict:
        value = value.values()
    elif type(value) is not list:
        return
    if not left:
        raise InvalidRequestError(f"maps and lists are nested {MAX_NESTING} deep at most")
    for inner in value:
        if type(inner) in _CONTAINERS:
            _check_nesting(inner, left - 1)


def _unpack(entries: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entries:
        return _array(entries.get(b"data"), entries.get(b"dtype"), entries.get(b"shape"))
    if "__ndarray__" in entries:
        return _array(entries.get("data"), entries.get("dtype"), entries.get("shape"))
    if b"__npgeneric__" in entries:
        return _scalar(entries.get(b"data"), entries.get(b"dtype"))
    if "__npgeneric__" in entries:
        return _scalar(entries.get("data"), entries.get("dtype"))
    return entries


def _array(data: Any, name: Any, shape: Any) -> np.ndarray[Any, Any]:
    dtype = _dtype(name)
    if type(data) is not bytes or type(shape) is not list:
        raise InvalidRequestError(
            f"an array has bytes and a list, not {type(data).__name__} and {type(shape).__name__}"
        )
    if len(shape) > MAX_DIMENSIONS or any([type(size) is not int or size < 0 for size in shape]):  # noqa: C419 - faster
        raise InvalidRequestError(
            f"an array has at most {MAX_DIMENSIONS} dimensions, each an integer of at least 0, got {str(shape)[:100]}"
        )
    if math.prod(shape) * dtype.itemsize != len(data):
        raise InvalidRequestError(f"an array {shape} of {name} has another number of bytes than {len(data)}")
    try:
        array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, data)
    except ValueError as error:  # one dimension is 0, and the others too large
        raise InvalidRequestError(f"there is no array of shape {shape}: {error}") from None
    return array if name not in _BIG_ENDIAN else array.byteswap()


def _scalar(data: Any, name: Any) -> np.ndarray[Any, Any]:
    dtype = _dtype(name)
    if dtype.kind == "b":
        fits = type(data) is bool
    elif dtype.kind == "f":
        fits = type(data) is float or type(data) is int
    else:
        fits = type(data) is int and np.iinfo(dtype).min <= data <= np.iinfo(dtype).max
    if not fits:
        raise InvalidRequestError(f"a scalar of {name} can't be {str(data)[:50]!r}")
    with np.errstate(over="ignore"):  # a number too large for the dtype is infinite
        return np.array(data, dtype)


def _dtype(name: Any) -> np.dtype[Any]:
    dtype = None if type(name) is not str else _DTYPES.get(name) or _BIG_ENDIAN.get(name)
    if dtype is None:
        raise InvalidRequestError(f"arrays are of bool, integers or floating point numbers, not {str(name)[:50]!r}")
    return dtype
