"""Messages of many requests and replies."""

from __future__ import annotations

import ast
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict, TensorDictBase

import aioinfer.transports.network
import aioinfer.web
from aioinfer import InvalidRequestError, ModelError, PeerDiedError, ServerClosedError
from aioinfer.transports.network.errors import error_of, pack_error
from aioinfer.transports.network.messages import (
    Payload,
    check_payload,
    decode_group,
    decode_header,
    encode_message,
    group_payloads,
)

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


def encode(payloads: list[Payload]) -> bytes:
    groups = group_payloads([check_payload(payload)[0] for payload in payloads])
    return encode_message({"own": 1}, [({"numbers": list(group.indices)}, group) for group in groups])


def decode(message: bytes) -> dict[int, Payload]:
    _, groups, position = decode_header(message)
    found: dict[int, Payload] = {}
    for about in groups:
        payloads, position = decode_group(about, message, position)
        found.update(zip(about["numbers"], payloads, strict=True))
    assert position == len(message)
    return found


def there(*payloads: Payload) -> list[Any]:
    found = decode(encode(list(payloads)))
    return [found[index] for index in range(len(payloads))]


def same(one: TensorDictBase, other: TensorDictBase) -> bool:
    if one.batch_size != other.batch_size or set(one.keys()) != set(other.keys()):
        return False
    for key in one.keys():  # noqa: SIM118 - which a TensorDict does not iterate over
        value, found = one[key], other[key]
        if isinstance(value, TensorDictBase):
            if not same(value, found):
                return False
        elif isinstance(value, torch.Tensor):
            if value.dtype != found.dtype or not torch.equal(value, found):
                return False
        elif value != found:
            return False
    return True


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype_travel(dtype: torch.dtype) -> None:
    for shape in ((), (3,), (2, 0), (2, 3, 4)):
        values = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(dtype)
        asked = TensorDict({"x": values, "y": torch.zeros(1)})
        one, other = there(asked, asked.clone())
        assert same(one, asked)
        assert same(other, asked)
        (named,) = there({"x": values})
        found = named["x"]
        assert torch.equal(found if isinstance(found, torch.Tensor) else torch.from_numpy(found.copy()), values)


def test_a_tensordict_comes_as_it_left() -> None:
    asked = TensorDict(
        {
            "a": torch.ones(3, requires_grad=True),
            "strided": torch.arange(12.0).reshape(3, 4).T[::2],
            "inner": TensorDict({"b": torch.ones(2, 5), "text": NonTensorData("inside")}, batch_size=[2]),
            "empty": TensorDict({}, batch_size=[4]),
            "text": NonTensorData("hello"),
            "deep": TensorDict({"deeper": TensorDict({"c": torch.tensor(1)}, batch_size=[])}, batch_size=[]),
        }
    )
    for found in there(asked, asked.clone()):
        assert same(found, asked.detach())
        assert not found["a"].requires_grad
    rows = TensorDict({"x": torch.ones(4, 2), "in": TensorDict({"y": torch.ones(4, 3, 1)}, [4, 3])}, batch_size=[4])
    assert same(there(rows)[0], rows)


def test_entries_by_name_come_as_they_left() -> None:
    array = np.arange(6.0).reshape(2, 3)
    array.flags.writeable = False
    inner = TensorDict({"z": torch.ones(2, 1)}, batch_size=[2])
    asked: dict[str, Any] = {"x": array, "n": 3, "list": [[1.0, 2.0]], "map": {"y": np.float32(2)}, "td": inner}
    (found,) = there(dict(asked))
    assert np.array_equal(found["x"], array)
    assert (found["n"], found["list"], float(found["map"]["y"])) == (3, [[1.0, 2.0]], 2.0)
    assert same(found["td"], inner)
    many = there(*({"x": np.full(3, value, np.float32)} for value in range(50)), {"x": np.ones(2, np.float32)})
    assert [one["x"][0] for one in many] == [*range(50), 1]


def test_what_is_alike_travels_as_one_group() -> None:
    alike: list[Payload] = [{"x": np.ones(3, np.float32), "y": torch.zeros(2)} for _ in range(3)]
    tds: list[Payload] = [TensorDict({"x": torch.ones(3)}) for _ in range(3)]
    other: list[Payload] = [
        {"y": np.zeros(2, np.float32), "x": np.ones(3, np.float64)},
        TensorDict({"x": torch.ones(4)}),
    ]
    assert [group.indices for group in group_payloads([*alike, *tds])] == [[0, 1, 2], [3, 4, 5]]
    grouped = group_payloads([*alike, *tds, *other])
    assert sorted(map(list, (group.indices for group in grouped))) == [[0, 1, 2], [3, 4, 5], [6], [7]]


@pytest.mark.parametrize(
    "payload",
    [
        TensorDict({"x": torch.ones(2, dtype=torch.complex64)}),
        {"x": np.ones(2, np.complex128)},
        TensorDict({"x": torch.ones((1,) * 9)}),
        TensorDict({"x": torch.ones(3).to_sparse()}),
        TensorDict({"x": NonTensorData(object())}),
        {"x": "a" * 5_000_000},
        LazyStackedTensorDict(TensorDict({"x": torch.ones(1)}), TensorDict({"y": torch.ones(2)})),
    ],
    ids=["complex", "complex by name", "dimensions", "sparse", "object", "long text", "unlike rows"],
)
def test_what_does_not_travel_is_refused_before_it_is_sent(payload: Payload) -> None:
    with pytest.raises(InvalidRequestError):
        encode([payload])


def test_a_lazy_stack_travels_as_the_tensordict_that_it_is() -> None:
    asked = LazyStackedTensorDict(TensorDict({"x": torch.ones(1)}), TensorDict({"x": torch.zeros(1)}))
    assert same(there(asked)[0], TensorDict({"x": torch.tensor([[1.0], [0.0]])}, batch_size=[2]))


# -- rubbish ---------------------------------------------------------------------------------------------------

GOOD = encode([{"x": np.ones(3, np.float32), "n": 1}, TensorDict({"y": torch.ones(2, 2)}), {"x": np.ones(2)}])


def message_of(header: Any, columns: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    head: bytes = struct.pack("<I", len(packed)) + packed
    return head + bytes(-len(head) % 8) + columns


def group_of(**changes: Any) -> dict[str, Any]:
    group = {
        "numbers": [1],
        "by_name": True,
        "batch_size": [],
        "sizes": [],
        "leaves": [[["x"], "f4", [2]]],
        "plain": None,
    }
    return {**group, **changes}


MALFORMED: list[Any] = [
    b"",
    b"\xff\xff\xff\xff",
    pickle.dumps({"groups": []}),
    message_of([]),
    message_of({}),
    message_of({"groups": 3}),
    message_of({"groups": [3]}),
    message_of({"groups": [{}]}),
    message_of({"groups": [group_of(numbers=[1, 1])]}, bytes(16)),
    message_of({"groups": [group_of(numbers=[-1])]}, bytes(8)),
    message_of({"groups": [group_of(numbers=["1"])]}, bytes(8)),
    message_of({"groups": [group_of()]}, bytes(7)),
    *(
        message_of({"groups": [group_of(leaves=[[path, dtype, shape]])]}, bytes(64))
        for path, dtype, shape in (
            (["x"], "O", [1]),
            (["x"], "c8", [1]),
            (["x"], "U4", [1]),
            (["x"], "M8", [1]),
            (["x"], ["f4"], [1]),
            (["x"], "f4", [-1]),
            (["x"], "f4", [2**40, 2**40]),
            (["x"], "f4", [0, 2**47]),
            (["x"], "f4", [1] * 9),
            (["x"], "f4", [True]),
            (["x"], "f4", 3),
            ([], "f4", [1]),
            ("x", "f4", [1]),
            ([1], "f4", [1]),
            (["x"] * 1000, "f4", [1]),
        )
    ),
    message_of({"groups": [group_of(leaves=[[["x"], "f4", [1]], [["x", "y"], "f4", [1]]])]}, bytes(64)),
    message_of({"groups": [group_of(by_name=False, batch_size=[2**40], leaves=[])]}),
    message_of({"groups": [group_of(by_name=False, batch_size=[3])]}, bytes(8)),
    message_of({"groups": [group_of(plain=[])]}, bytes(8)),
    message_of({"groups": [group_of(sizes=[[["x"], [2]]])]}, bytes(8)),
    message_of({"groups": [group_of(leaves=[[["x"], "f4", [0]]] * 5000)]}),
]


@pytest.mark.parametrize("message", MALFORMED, ids=lambda message: repr(message[:40]))
def test_a_malformed_message_is_refused_with_a_reason(message: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="malformed"):
        decode(message)


@settings(max_examples=200)
@given(st.data())
def test_rubbish_raises_nothing_else(data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        message = bytearray(GOOD)
        for place in data.draw(st.lists(st.integers(0, len(message) - 1), min_size=1, max_size=5)):
            message[place] = data.draw(st.integers(0, 255))
        rubbish = bytes(message[: data.draw(st.integers(0, len(message)))])
    else:
        rubbish = message_of(data.draw(VALUES), bytes(16))
    try:
        decode(rubbish)
    except (InvalidRequestError, AssertionError):
        pass


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*group_of(), "groups", "own"]), inner, max_size=8)
    ),
    max_leaves=12,
)


# -- errors ----------------------------------------------------------------------------------------------------


class PolicyError(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)


@pytest.mark.parametrize(
    "error",
    [ValueError("two"), KeyError("x"), ServerClosedError("gone"), OSError("no"), MemoryError(), ArithmeticError("")],
    ids=repr,
)
def test_an_error_of_a_known_class_comes_as_it_left(error: Exception) -> None:
    found = error_of(msgpack.unpackb(msgpack.packb(pack_error(error, note="error id 1"))))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.__notes__ == ["error id 1"]


@pytest.mark.parametrize(
    "error",
    [
        PolicyError(3, "why"),
        type("ValueError", (Exception,), {})("no such class"),
        UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
        io.UnsupportedOperation("read"),
    ],
    ids=repr,
)
def test_an_error_of_another_class_is_named(error: Exception) -> None:
    found = error_of(pack_error(error, note="error id 1"))
    assert type(found) is ModelError
    assert type(error).__qualname__ in str(found)
    assert str(error) in str(found)
    assert "error id 1" in str(found)


def test_a_server_can_name_no_class_that_is_not_an_error() -> None:
    for name in ("system", "SystemExit", "KeyboardInterrupt", "clone_exception", "object", "__import__"):
        assert type(error_of((name, "text", ""))) is ModelError
    assert type(error_of(("PeerDiedError", "text", ""))) is PeerDiedError


def test_nothing_that_reads_a_network_can_unpickle() -> None:
    for package in (aioinfer.transports.network, aioinfer.web):
        for path in Path(package.__path__[0]).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                    assert not [name for name in names if "pickl" in name or "marshal" in name], path.name
