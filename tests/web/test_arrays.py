from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import pytest

from aioinfer.errors import InvalidRequestError
from aioinfer.web.arrays import MAX_NESTING, packb, unpackb
from tests.web.robots import pack, unpack

DTYPES = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
SHAPES = ((), (1,), (3,), (0,), (2, 0, 3), (2, 3), (1, 2, 1, 2, 1, 2, 1, 2))


def array_message(data: Any = bytes(8), dtype: Any = "<f4", shape: Any = (2,)) -> bytes:
    return packed({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})


def scalar_message(data: Any, dtype: Any) -> bytes:
    return packed({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


def packed(value: Any) -> bytes:
    message: bytes = msgpack.packb(value)
    return message


def same(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_of_clients_and_to_clients_are_what_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    assert same(unpackb(pack(array)), array)
    assert same(unpack(packb(array)), array)
    assert packb(array) == pack(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_the_other_byte_order_become_those_of_this_machine(dtype: str) -> None:
    array = np.arange(3).astype(dtype)
    assert same(unpackb(pack(array.astype(array.dtype.newbyteorder(">")))), array)


def test_arrays_that_are_not_contiguous_are_packed_too() -> None:
    array = np.arange(12.0).reshape(3, 4)[::-1, ::2]
    assert same(unpack(packb(array)), array)


@pytest.mark.parametrize("kind", DTYPES)
def test_numpy_scalars_become_arrays_without_dimensions(kind: str) -> None:
    scalar = np.dtype(kind).type(1)
    assert same(np.asarray(unpackb(pack(scalar))), np.array(scalar))  # float64 is a float of Python, too


def test_a_number_too_large_for_its_dtype_is_infinite() -> None:
    assert unpackb(scalar_message(1e300, "<f2")) == np.inf


def test_markers_may_be_strings() -> None:
    array = np.arange(3.0)
    text_keys = {"__ndarray__": True, "data": array.tobytes(), "dtype": "float64", "shape": [3]}
    assert same(unpackb(packed(text_keys)), array)
    assert same(unpackb(packed({"__npgeneric__": True, "data": 2, "dtype": "int32"})), np.array(2, np.int32))


def test_other_values_stay_what_they_are() -> None:
    value = {"prompt": "pick", "n": 3, "x": 0.5, "yes": True, "none": None, "raw": b"\x00", "list": [1, [2]], b"b": {}}
    assert unpackb(packed(value)) == value
    assert unpackb(packb(value)) == value


def test_an_array_shares_the_memory_of_the_message_and_can_not_be_written_to() -> None:
    array = unpackb(pack(np.zeros(3)))
    assert not array.flags.writeable
    assert not array.flags.owndata


def object_array() -> bytes:
    """50 bytes that end the process of a server which believes them: they become references to Python objects."""
    message = array_message(bytes(8), "|O", [1])
    assert len(message) <= 50
    return message


@pytest.mark.parametrize(
    "message",
    [
        object_array(),
        array_message(dtype="O"),
        array_message(dtype="object"),
        array_message(dtype="|V8", shape=[1]),
        array_message(dtype="<U2", shape=[1]),
        array_message(dtype="|S8", shape=[1]),
        array_message(dtype="<c8", shape=[1]),
        array_message(dtype="<M8[s]", shape=[1]),
        array_message(dtype="<m8[s]", shape=[1]),
        array_message(dtype="<f4,<f4", shape=[1]),
        array_message(dtype="(2,)<f4", shape=[1]),
        array_message(dtype="f4" * 10_000),
        array_message(dtype=[["x", "<f4"]]),
        array_message(dtype={"names": ["x"], "formats": ["O"]}),
        array_message(dtype=b"<f4"),
        array_message(dtype=None),
        array_message(dtype=4),
        array_message(shape=[-1]),
        array_message(shape=[-1, -2]),
        array_message(shape=[3]),
        array_message(shape=[1]),
        array_message(shape=[]),
        array_message(shape=[2.0]),
        array_message(shape=[True, 2]),
        array_message(shape=[None]),
        array_message(shape=2),
        array_message(shape="2"),
        array_message(shape={"0": 2}),
        array_message(shape=[1] * 8 + [2]),
        array_message(shape=[2**63, 2]),
        array_message(shape=[2**64 - 1] * 8),
        array_message(b"", shape=[0, 2**62]),
        array_message(b"", shape=[0] + [2**64 - 1] * 7),
        array_message(data="text"),
        array_message(data=[1.0, 2.0]),
        array_message(data=None),
        array_message(data=8),
        packed({b"__ndarray__": True}),
        packed({"__ndarray__": False, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}),
        scalar_message(math.nan, "<i4"),
        scalar_message(math.inf, "<i8"),
        scalar_message(0.5, "<i4"),
        scalar_message(300, "|u1"),
        scalar_message(-1, "<u8"),
        scalar_message(2**64 - 1, "<i8"),
        scalar_message(2, "|b1"),
        scalar_message("1", "<i4"),
        scalar_message(b"1234", "<f4"),
        scalar_message(None, "<f4"),
        scalar_message([1.0], "<f4"),
        scalar_message(0, "|O"),
        scalar_message({}, "<f4"),
        b"",
        b"\xc1",
        b"\x81\xa1",
        pack({"a": np.zeros(3)})[:-1],
        pack({"a": np.zeros(3)}) + b"\x00",
        packed({1: 2}),
        packed({"a": {2.0: 1}}),
        packed({("a", "b"): 1}),
        b"\xa2\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100 + b"\x00",
        b"\x81\xa1a" * 100 + b"\x00",
        b"\x91" * 100_000,
    ],
    ids=lambda message: message[:60].hex(),
)
def test_malformed_messages_are_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequestError) as error:
        unpackb(message)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("container", [lambda inner: [inner], lambda inner: {"a": inner}])
def test_maps_and_lists_may_be_nested_so_deep_and_no_deeper(container: Any) -> None:
    value: Any = 0
    for _ in range(MAX_NESTING):
        value = container(value)
    assert unpackb(packed(value)) == value
    with pytest.raises(InvalidRequestError, match="nested"):
        unpackb(packed(container(value)))


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, np.zeros(2, complex), np.array(["a"]), np.array([None]), np.datetime64("2020-01-01")]
)
def test_what_a_message_can_not_carry_is_not_packed(value: Any) -> None:
    with pytest.raises(TypeError):
        packb({"a": value})
