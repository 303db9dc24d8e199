"""What travels pickled: requests of any layout, also with entries that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict, TensorDictBase

from aioinfer import InferenceServer, InvalidRequestError, MPTransport
from aioinfer.testing import double, eventually, request
from tests.limits import HANG


def echo(td: TensorDictBase) -> TensorDictBase:
    return td.clone()


def same(found: TensorDictBase, expected: TensorDictBase) -> bool:
    """Whether both have the same entries."""
    keys = set(expected.keys())
    if set(found.keys()) != keys:
        return False
    for key in keys:
        value, wanted = found[key], expected[key]
        if isinstance(wanted, TensorDictBase):
            if not same(value, wanted):
                return False
        elif isinstance(wanted, torch.Tensor):
            if value.dtype != wanted.dtype or not torch.equal(value, wanted):
                return False
        elif value != wanted:
            return False
    return True


REQUESTS: dict[str, Callable[[], TensorDictBase]] = {
    "text": lambda: TensorDict({"x": torch.randn(3), "prompt": "go left"}),
    "data that is no tensor": lambda: TensorDict({"x": torch.randn(3), "who": NonTensorData({"name": "a", "age": 3})}),
    "nested": lambda: TensorDict({"deep": TensorDict({"er": TensorDict({"x": torch.randn(2, 2)}), "text": "a"})}),
    "many dtypes": lambda: TensorDict(
        {
            str(dtype): torch.randint(0, 2, (5,)).to(dtype)
            for dtype in (torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.double, torch.complex64)
        }
    ),
    "no elements": lambda: TensorDict({"none": torch.zeros(0, 3), "some": torch.randn(1)}),
    "nothing": lambda: TensorDict({}),
    "scalars": lambda: TensorDict({"x": torch.randn(()), "yes": torch.tensor(True)}),
    "tensors that do not lie in a row": lambda: TensorDict({"x": torch.randn(4, 3).T, "y": torch.ones(1).expand(5)}),
    "gradients": lambda: TensorDict({"x": torch.randn(3).requires_grad_(), "y": torch.nn.Parameter(torch.randn(2))}),
    "a locked one": lambda: TensorDict({"x": torch.randn(3)}).lock_(),
    "with a device": lambda: TensorDict({"x": torch.randn(3)}, device="cpu"),
    "4 megabytes": lambda: TensorDict({"x": torch.randn(1_000_000)}),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_of_any_layout_comes_back_as_it_was(kind: str) -> None:
    torch.manual_seed(0)
    make = REQUESTS[kind]
    with InferenceServer(echo, MPTransport()) as server:
        assert isinstance(server.transport, MPTransport)
        clients = server.transport.clients(4)
        asked = [make() for _ in range(8)]
        with ThreadPoolExecutor(4) as pool:
            replies = pool.map(lambda index: clients[index % 4](asked[index], HANG), range(8))
            for td, reply in zip(asked, replies, strict=True):
                assert int(reply["policy_version"]) == 0
                assert same(reply.exclude("policy_version"), td)
                assert not any(value.requires_grad for value in reply.values(True, True) if torch.is_tensor(value))


def test_requests_of_unlike_layout_are_batched_apart() -> None:
    batches: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        batches.append(td.batch_size[0])
        return td.clone()

    transport = MPTransport()
    server = InferenceServer(model, transport)
    kinds = list(REQUESTS.values())[:3]
    asked = [kinds[index % 3]() for index in range(9)]
    replies = [transport.client().submit(td) for td in asked]
    eventually(lambda: server.stats().pending == 9)
    with server:
        for td, reply in zip(asked, replies, strict=True):
            assert same(reply.result(HANG).exclude("policy_version"), td)
    assert batches == [3, 3, 3]


def test_stacks_of_unlike_tensordicts_travel_where_the_server_asks_for_their_batch_size() -> None:
    td = LazyStackedTensorDict(TensorDict({"x": torch.ones(2)}), TensorDict({"x": torch.ones(2) * 2}))
    transport = MPTransport()
    spec = TensorDict({"x": torch.zeros(2, 2)}, batch_size=[2])
    with InferenceServer(lambda td: td.clone(), transport, request_spec=spec):
        reply = transport.client()(td, HANG)
        assert torch.equal(reply["x"], td["x"])


class Stubborn:
    def __reduce__(self) -> Any:
        raise ArithmeticError("it does not want to travel")


class Explosive:
    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise ArithmeticError("it does not want to arrive")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Stubborn(), "the request does not pickle: ArithmeticError: it does not want to travel"),
        (Explosive(), "can't be unpickled in the server's process: ArithmeticError: it does not want to arrive"),
    ],
)
def test_a_request_that_does_not_travel_is_refused(content: Any, message: str) -> None:
    transport = MPTransport()
    with InferenceServer(echo, transport) as server:
        client = transport.client()
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match=message):
                client(TensorDict({"x": NonTensorData(content)}), HANG)
            assert same(client(request(1), HANG).exclude("policy_version"), request(1))
        assert server.stats().ok == 2


@pytest.mark.parametrize("content", [Stubborn(), Explosive()])
def test_a_reply_that_does_not_travel_is_an_error_of_its_request(content: Any) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            return TensorDict({"action": NonTensorData(content, batch_size=td.batch_size)}, td.batch_size)
        return double(td)

    transport = MPTransport()
    with InferenceServer(model, transport):
        client, other = transport.clients(2)
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="it does not want to"):
                client(request(-1), HANG)
            for neighbour in (client, other):
                assert neighbour(request(2), HANG)["action"][0] == 4
