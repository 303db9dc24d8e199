"""Clients and transports that are used, or made, under modes of torch: what lives long is made under modes of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer import InferenceServer, MPTransport, ProcessSlotTransport, connect
from aioinfer.interaction_type import MODES as CODES
from tests.limits import HANG

COUNT = 10


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")  # stands for any that is not the CPU
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "a default device": default_device,
    "a default dtype": default_dtype,
}


def ask(value: float) -> TensorDict:
    return TensorDict({"observation": torch.full((3,), value, dtype=torch.float32, device="cpu")})


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Parameter(torch.full((), 2.0, dtype=torch.float32, device="cpu"))

    def forward(self, observation: Tensor) -> Tensor:
        return observation * self.two


def make_model() -> TensorDictModule:
    return TensorDictModule(Double(), in_keys=["observation"], out_keys=["action"])


def slots() -> ProcessSlotTransport:
    reply = TensorDict({"action": torch.zeros(3, dtype=torch.float32, device="cpu")})
    return ProcessSlotTransport(ask(0), reply, num_slots=4 * COUNT + 8, rows=3)


MAKES: list[Any] = [slots, MPTransport]


def check(reply: TensorDictBase, value: float, version: int) -> None:
    assert reply["action"].device.type == reply["policy_version"].device.type == "cpu"
    assert not reply["action"].is_inference()
    assert not reply["policy_version"].is_inference()
    assert reply["action"].tolist() == [2 * value] * 3
    assert reply["policy_version"].dtype == torch.int64
    assert reply["policy_version"].tolist() == version


def call_in_every_way(source: Any, clients: list[Any], tasks: list[Any], version: int) -> None:
    """Blocking, with futures, and as tasks of one tick: few are copied one by one, many at once; and several rows."""
    check(source.client()(ask(1), HANG), 1, version)
    for rows in (3, 1, 3):
        reply = clients[0](ask(5).expand(rows).contiguous(), HANG)
        assert reply.batch_size == (rows,)
        for row in reply.unbind(0):
            check(row, 5, version)
    for value, client in enumerate(clients):
        check(client(ask(value), HANG), value, version)
    futures = [client.submit(ask(value)) for value, client in enumerate(clients)]
    for value, future in enumerate(futures):
        check(future.result(HANG), value, version)

    async def gather() -> list[TensorDictBase]:
        async with asyncio.timeout(HANG):
            return list(await asyncio.gather(*[client(ask(value)) for value, client in enumerate(tasks)]))

    for value, reply in enumerate(asyncio.run(gather())):
        check(reply, value, version)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [True, False], ids=["first inside", "first outside"])
@pytest.mark.parametrize("make", MAKES)
def test_clients_may_be_used_inside_and_outside_of_a_mode_whatever_the_version(
    make: Any, first: bool, mode: str
) -> None:
    transport = make()
    with InferenceServer(make_model(), transport) as server:
        clients, tasks = transport.clients(COUNT), transport.async_clients(COUNT)
        for version in range(4):
            with MODES[mode]() if (version % 2 == 0) is first else nullcontext():
                call_in_every_way(transport, clients, tasks, version)
            server.update_weights(make_model())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", MAKES)
def test_a_transport_may_be_made_and_a_server_started_inside_a_mode(make: Any, mode: str) -> None:
    with MODES[mode]():
        transport = make()
        server = InferenceServer(make_model(), transport).start()
    try:
        with MODES[mode]():
            call_in_every_way(transport, transport.clients(COUNT), transport.async_clients(COUNT), 0)
        with connect(transport.address, timeout=HANG) as remote:
            call_in_every_way(remote, remote.clients(COUNT), remote.async_clients(COUNT), 0)
    finally:
        server.shutdown()


def test_rows_of_replies_that_came_together_have_histories_of_their_own() -> None:
    """What one caller writes in place does not break the graph that another caller's reply is part of."""
    transport = slots()

    async def gather() -> list[TensorDictBase]:
        return await asyncio.gather(*[client(ask(value)) for value, client in enumerate(tasks)])

    with InferenceServer(make_model(), transport):
        tasks = transport.async_clients(COUNT)
        first, second, *_ = asyncio.run(gather())
    weight = torch.ones(3, requires_grad=True)
    loss = (first["action"] * weight).sum()
    second["action"].clamp_(-1, 1)
    loss.backward()
    second["action"].mul_(weight)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(3))


def test_the_code_of_a_mode_leaves_a_bit_of_the_header_for_requests_of_several_rows() -> None:
    assert len(CODES) <= 8
