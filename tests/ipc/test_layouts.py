"""What may lie in a slot: layouts of requests and replies, and how others are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase

from aioinfer import (
    InferenceServer,
    InvalidRequestError,
    ModelError,
    ProcessSlotTransport,
)
from aioinfer.testing import double, eventually, request
from tests.limits import HANG
from tests.process_workers import KINDS, call, client_of
from tests.transports import process_slots


def echo(td: TensorDictBase) -> TensorDictBase:
    return td.clone()


# -- layouts -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], TensorDict]] = {
    "nested": lambda: TensorDict(
        {
            "a": torch.randn(3),
            "deep": TensorDict({"er": TensorDict({"x": torch.randn(2, 2)}), "y": torch.tensor([1, 2, 3])}),
        }
    ),
    "nested with batch sizes of their own": lambda: TensorDict(
        {"a": torch.randn(4, 3), "deep": TensorDict({"x": torch.randn(4, 2)}, batch_size=[4, 2])}, batch_size=[4]
    ),
    "many dtypes": lambda: TensorDict(
        {
            str(dtype): torch.randint(0, 2, (5,)).to(dtype)
            for dtype in (torch.bool, torch.int64, torch.int32, torch.uint8, torch.bfloat16, torch.half, torch.double)
        }
    ),
    "complex numbers": lambda: TensorDict({"z": torch.randn(3, dtype=torch.complex64)}),
    "a tensor without elements": lambda: TensorDict({"none": torch.zeros(0, 3), "some": torch.randn(1)}),
    "nothing but tensors without elements": lambda: TensorDict({"none": torch.zeros(0)}),
    "no tensors": lambda: TensorDict({}),
    "scalars": lambda: TensorDict({"x": torch.randn(()), "n": torch.tensor(7), "yes": torch.tensor(True)}),
    "rows of more than 1 KiB": lambda: TensorDict({"image": torch.randn(3, 32, 32), "x": torch.randn(2)}),
    "a batch dimension": lambda: TensorDict({"x": torch.randn(8, 3), "done": torch.zeros(8, 1).bool()}, batch_size=[8]),
    "names as attributes have": lambda: TensorDict(
        {"keys": torch.randn(2), "values": torch.randn(2), "": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copy", [True, False], ids=["copied", "lent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_request_of_any_layout_comes_back_as_it_was(layout: str, copy: bool, kind: str) -> None:
    torch.manual_seed(0)
    make = LAYOUTS[layout]
    transport = ProcessSlotTransport(make(), make(), num_slots=12)
    with InferenceServer(echo, transport) as server:
        clients = [client_of(transport, kind, copy=copy) for _ in range(12)]
        with ThreadPoolExecutor(12) as pool:
            for _ in range(3):
                asked = [make() for _ in clients]
                for td, reply in zip(asked, pool.map(call, clients, asked), strict=True):
                    assert reply["policy_version"].shape == reply.batch_size == td.batch_size
                    reply = reply.exclude("policy_version")
                    assert set(reply.keys(True, True)) == set(td.keys(True, True))
                    for key, value in td.items(True):
                        if isinstance(value, torch.Tensor):
                            assert reply[key].dtype == value.dtype
                            assert torch.equal(reply[key], value)
                        else:
                            assert reply[key].batch_size == value.batch_size
        assert server.stats().ok == 36


def test_requests_with_a_batch_dimension_meet_as_rows_of_a_batch_with_two() -> None:
    seen: list[torch.Size] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        seen.append(td.batch_size)
        return double(td)

    td = TensorDict({"observation": torch.arange(24.0).view(8, 3)}, batch_size=[8])
    transport = ProcessSlotTransport(td, double(td), num_slots=4)
    server = InferenceServer(model, transport)
    replies = [transport.client().submit(td * index) for index in range(4)]
    eventually(lambda: server.stats().pending == 4)
    with server:
        for index, reply in enumerate(replies):
            assert torch.equal(reply.result(HANG)["action"], td["observation"] * 2 * index)
    assert seen == [torch.Size([4, 8])]


def test_tensors_are_copied_from_wherever_and_however_they_lie() -> None:
    base = torch.arange(12.0).view(3, 4)
    kinds = (base[:, 1], base.T[2], torch.ones(1).expand(3), base[0, ::2].repeat(2)[:3], torch.ones(3).requires_grad_())
    transport = process_slots()
    with InferenceServer(double, transport):
        client = transport.client()
        for tensor in kinds:
            reply = call(client, TensorDict({"observation": tensor}))
            assert torch.equal(reply["action"], tensor.detach() * 2)
            assert not reply["action"].requires_grad


@pytest.mark.parametrize("which", ["request", "response"])
def test_specs_are_of_tensors_only(which: str) -> None:
    specs: list[Any] = [
        {"observation": torch.zeros(3)},
        None,
        TensorDict({"text": NonTensorData("a")}),
        TensorDict({"deep": TensorDict({"text": "a"})}),
    ]
    for spec in specs:
        pair = (spec, request(0)) if which == "request" else (request(0), spec)
        with pytest.raises(TypeError, match=f"^{which}_spec "):
            ProcessSlotTransport(*pair, num_slots=1)


@pytest.mark.parametrize("count", [0, -1, True, 2.0, None])
def test_the_number_of_slots_is_a_positive_integer(count: Any) -> None:
    with pytest.raises(ValueError, match=f"num_slots must be an integer of at least 1, got {count!r}"):
        ProcessSlotTransport(request(0), request(0), num_slots=count)


# -- refusals at the client --------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "another type": ([torch.ones(3)], r"a request must be a TensorDict, .*, got list"),
    "another type by name": ({"observation": "x"}, r'"observation" can\'t be a tensor'),
    "a missing name": ({"other": torch.ones(3)}, r'the request lacks "observation"; expected "observation"'),
    "another shape by name": ({"observation": np.ones(4, np.float32)}, r'"observation" of the request has shape \[4\]'),
    "another dtype by name": ({"observation": np.ones(3)}, r"has dtype torch\.float64, expected torch\.float32"),
    "a missing key": (TensorDict({"other": torch.ones(3)}), r'the request lacks "observation"; expected "observation"'),
    "another shape": (request(0, size=4), r'"observation" of the request has shape \[4\], expected \[3\]'),
    "another dtype": (request(0).int(), r"has dtype torch\.int32, expected torch\.float32"),
    "another batch size": (
        TensorDict({"observation": torch.ones(3)}, batch_size=[3]),
        r'"observation" of the request has shape \[3\], expected \[3, 3\]',
    ),
    "another device": (request(0).to("meta"), r'"observation" of the request is on device meta, expected cpu'),
    "no tensor": (TensorDict({"observation": NonTensorData("x")}), r'"observation" of the request is a .*, expected a'),
    "a nested one": (TensorDict({"observation": TensorDict({"x": torch.ones(3)})}), r'lacks "observation"'),
    "an undeclared key": (
        TensorDict({"observation": torch.ones(3), "more": torch.ones(1)}),
        r'the request has undeclared "more"; expected "observation"',
    ),
    "an undeclared nested key": (
        TensorDict({"observation": torch.ones(3), "more": TensorDict({"x": torch.ones(1)})}),
        r"the request has undeclared \('more', 'x'\)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_request_of_another_layout_is_refused_at_the_client_and_counted(wrong: str, kind: str) -> None:
    td, message = WRONG[wrong]
    transport = process_slots()
    with InferenceServer(double, transport) as server:
        client = client_of(transport, kind)
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match=message):
                call(client, td)
        eventually(lambda: server.stats().rejected == 2)
        assert call(client, request(2))["action"][0] == 4
        assert server.stats().ok == 1


def test_undeclared_entries_are_left_out_where_that_was_asked_for() -> None:
    seen: list[set[Any]] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        seen.append(set(td.keys()))
        return double(td).set("extra", td["observation"])

    transport = ProcessSlotTransport(request(0), double(request(0)), num_slots=1, drop_undeclared=True)
    with InferenceServer(model, transport) as server:
        client = transport.client()
        td = request(3).set("more", torch.ones(5)).set("deep", TensorDict({"text": "a"}))
        reply = client(td, HANG)
        assert set(reply.keys()) == {"action", "policy_version"}
        assert reply["action"][0] == 6
        for wrong in (TensorDict({"more": torch.ones(3)}), request(1, size=2).set("more", torch.ones(1))):
            with pytest.raises(InvalidRequestError):
                client(wrong, HANG)
        assert server.stats().rejected == 2
    assert seen == [{"observation"}]


# -- the model's output ------------------------------------------------------------------------------------

OUTPUTS: dict[str, tuple[Callable[[TensorDictBase], Any], str]] = {
    "a missing key": (lambda td: TensorDict({}, td.batch_size), r'the response lacks "action"'),
    "an undeclared key": (
        lambda td: double(td).set("more", td["observation"]),
        r'the response has undeclared "more"; expected "action"',
    ),
    "another shape": (
        lambda td: TensorDict({"action": td["observation"][:, :2]}, td.batch_size),
        r'"action" of the response has shape \[2\], expected \[3\]',
    ),
    "another dtype": (
        lambda td: TensorDict({"action": td["observation"].double()}, td.batch_size),
        r'"action" of the response has dtype torch\.float64, expected torch\.float32',
    ),
    "a nested one": (lambda td: TensorDict({"action": double(td)}, td.batch_size), r'the response lacks "action"'),
    "text": (
        lambda td: TensorDict({"action": NonTensorData("x", batch_size=td.batch_size)}, td.batch_size),
        '"action" of the response is a',
    ),
    "one row too few": (lambda td: double(td)[1:], r"\[0\]"),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_of_another_layout_is_an_error_that_names_it_and_the_server_lives_on(output: str) -> None:
    make, message = OUTPUTS[output]
    transport = process_slots()
    with InferenceServer(lambda td: make(td) if (td["observation"] < 0).any() else double(td), transport) as server:
        client = transport.client()
        for _ in range(2):
            with pytest.raises(ModelError, match=message):
                client(request(-1), HANG)
            assert client(request(1), HANG)["action"][0] == 2
        assert (server.stats().ok, server.stats().failed) == (2, 2)


async def test_arrays_and_tensors_that_need_a_gradient_may_leave_in_one_tick() -> None:
    spec = TensorDict({"depth": torch.zeros(3, dtype=torch.uint16), "x": torch.zeros(3)})
    async with InferenceServer(echo, transport := ProcessSlotTransport(spec, spec, num_slots=12)):
        clients = transport.async_clients(12)
        calls = [
            client(
                x=torch.full((3,), float(index), requires_grad=True) if index == 5 else np.full(3, index, np.float32),
                depth=torch.full((3,), index, dtype=torch.uint16) if index == 5 else np.full(3, index, np.uint16),
            )
            for index, client in enumerate(clients)
        ]
        replies = await asyncio.wait_for(asyncio.gather(*calls), HANG)
    assert [int(reply["depth"][0]) for reply in replies] == list(range(12))
    assert [int(reply["x"][0]) for reply in replies] == list(range(12))


async def test_an_array_of_doubles_is_none_of_a_dtype_that_arrays_lack() -> None:
    spec = TensorDict({"x": torch.zeros(3, dtype=torch.bfloat16)})
    async with InferenceServer(echo, transport := ProcessSlotTransport(spec, spec, num_slots=2)):
        client, other = transport.async_clients(2)
        reply = other(x=[1, 2, 3.0], timeout=HANG)
        with pytest.raises(InvalidRequestError, match=r"dtype torch.float64, expected torch.bfloat16"):
            client.submit(x=np.zeros(3))
        assert (await reply)["x"].tolist() == [1, 2, 3]


def test_undeclared_entries_by_name_need_not_be_tensors_where_they_are_left_out() -> None:
    with InferenceServer(
        echo, transport := ProcessSlotTransport(request(0), request(0), num_slots=1, drop_undeclared=True)
    ):
        client = transport.client()
        assert client(observation=[1.0, 2, 3], info="left out", timeout=HANG)["observation"].tolist() == [1, 2, 3]
        with pytest.raises(InvalidRequestError, match="lacks"):
            client(info="left out", timeout=HANG)
