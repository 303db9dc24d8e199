"""Requests of several rows that lie in slots."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer import (
    InferenceServer,
    InvalidRequestError,
    ModelError,
    ProcessInferenceServer,
    ProcessSlotTransport,
    ThreadingTransport,
    connect,
)
from aioinfer.testing import GatedModel, double, eventually, request, request_of
from aioinfer.testing.callers import are_doubles, is_double
from aioinfer.testing.inspection import has_pending_job
from tests.effort import Effort
from tests.limits import HANG
from tests.process_workers import KINDS, Child, answer, ask_always, call, client_of

ROWS = 6


def slots(count: int = 4, rows: int = ROWS) -> ProcessSlotTransport:
    return ProcessSlotTransport(request(0), double(request(0)), num_slots=count, rows=rows)


def ask_for(values: Sequence[float] | None) -> TensorDict:
    """A request of a row for each of these values; ``None``: of one row of 0, without a dimension of rows."""
    return request(0) if values is None else request_of(*values)


def is_reply(reply: TensorDictBase, values: Sequence[float] | None) -> bool:
    """Whether a reply is that of ``double`` to ``ask_for(values)``."""
    return reply.batch_size == () and is_double(reply, 0) if values is None else are_doubles(reply, *values)


# -- layouts -----------------------------------------------------------------------------------------------


def seen(size: tuple[int, ...], *, seed: int) -> TensorDict:
    """A request of images, nested twice, with a mask for each row, and a leaf without elements."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (*size, 3, 8, 8), dtype=torch.uint8, generator=chance)
    inner = TensorDict({"pixels": pixels, "done": torch.rand(size, generator=chance) < 0.5}, batch_size=size)
    return TensorDict(
        {"camera": inner, "step": torch.rand(*size, 1, generator=chance), "none": torch.zeros(*size, 0)}, size
    )


def look(td: TensorDictBase) -> TensorDictBase:
    camera = td["camera"]
    brightness = camera["pixels"].flatten(-3).float().mean(-1) * camera["done"]
    head = TensorDict({"logits": brightness.unsqueeze(-1) + td["step"], "mask": ~camera["done"]}, td.batch_size)
    return TensorDict({"head": head}, td.batch_size)


@pytest.mark.parametrize("size", [(), (2,)], ids=["plain", "two agents"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_masks_and_nested_entries_have_rows_as_any_other(kind: str, size: tuple[int, ...]) -> None:
    example = seen(size, seed=0)
    transport = ProcessSlotTransport(example, look(example), num_slots=3, rows=ROWS, drop_undeclared=True)
    with InferenceServer(look, transport):
        client = client_of(transport, kind)
        for seed, rows in enumerate([(3,), (), (6,), (6,), (0,), (1,), (), (2,)]):
            td = seen((*rows, *size), seed=seed)
            expected = look(td)
            td["camera", "pixels"] = td["camera", "pixels"].transpose(-1, -2).contiguous().transpose(-1, -2)
            td["step"].requires_grad_()
            td["undeclared"] = torch.zeros(*rows, *size, 4)
            reply = call(client, td)
            assert reply.batch_size == reply["head"].batch_size == reply["policy_version"].shape == (*rows, *size)
            for key in (("head", "logits"), ("head", "mask")):
                assert torch.equal(reply[key], expected[key])


def test_more_rows_than_a_slot_has_are_refused_and_the_error_names_the_way_out() -> None:
    transport = slots()
    with InferenceServer(double, transport) as server:
        client = transport.client()
        assert client.max_rows == ROWS
        with pytest.raises(InvalidRequestError, match=r"the request has 7 rows, .* at most 6 .* with rows=7"):
            client(request_of(*range(7)), HANG)
        assert is_reply(client(request_of(*range(6)), HANG), range(6))
        with pytest.raises(InvalidRequestError, match=r'"observation" of the request has shape \[2, 4\], .* \[2, 3\]'):
            client(request_of(1, 2, size=4), HANG)
        with pytest.raises(InvalidRequestError, match=r"batch size \[1, 2\], expected \[\], or \[n\] for n rows"):
            client(request_of(1, 2).unsqueeze(0), HANG)
        assert (server.stats().ok, server.stats().rejected) == (1, 3)


@pytest.mark.parametrize("rows", [0, -1, True, 2.0, "3"])
def test_a_number_of_rows_is_a_positive_integer(rows: Any) -> None:
    with pytest.raises(ValueError, match="rows must be an integer of at least 1"):
        slots(rows=rows)


def test_a_model_that_returns_another_layout_fails_requests_of_several_rows() -> None:
    """Whatever it returned before; the next one is answered."""

    def model(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"action": torch.zeros(len(td), 5)}, td.batch_size) if td["observation"].sum() else double(td)

    transport = slots()
    with InferenceServer(model, transport):
        client = transport.client()
        for _ in range(2):
            with pytest.raises(ModelError, match=r'"action" of the response has shape \[5\], expected \[3\]'):
                client(request_of(1, 2), HANG)
            assert is_reply(client(request_of(0, 0), HANG), [0, 0])


# -- one slot after the other ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_shows_no_rows_of_the_request_before_nor_of_the_client_before(kind: str) -> None:
    """Whether there are more rows, fewer, none, or one without a dimension of rows."""
    transport = slots(1)
    sizes: list[Sequence[float] | None] = [[1, 2, 3, 4], [5], None, [6, 7], [], None, range(8, 14), []]
    with InferenceServer(double, transport):
        for turn in range(len(sizes)):
            client = client_of(transport, kind)
            for values in sizes[turn:] + sizes[:turn]:
                reply = call(client, ask_for(values))
                assert is_reply(reply, values)
                assert reply["policy_version"].shape == reply.batch_size
            client.close()
            eventually(lambda: transport.free_slots == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_lent_rows_lie_in_the_slot_until_the_next_request_and_copies_never_change(kind: str) -> None:
    transport = slots()
    with InferenceServer(double, transport):
        lent, copied, other = (client_of(transport, kind, copy=copy) for copy in (False, True, False))
        first, kept = call(lent, request_of(1, 2, 3)), call(copied, request_of(1, 2, 3))
        for value in range(4, 20):
            before = first["action"].clone()
            call(other, request_of(*range(100, 100 + ROWS)))
            assert torch.equal(first["action"], before)  # what others ask does not change it
            reply = call(lent, request_of(value, value + 1))
            assert is_reply(reply, [value, value + 1])
            assert reply["action"].data_ptr() == first["action"].data_ptr()
            assert torch.equal(first["action"][:2], reply["action"])
        reply = call(copied, request_of(7, 8))
        reply["action"].fill_(-1)
        assert is_reply(kept, [1, 2, 3])
        assert reply["action"].untyped_storage().nbytes() == 2 * 3 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_reply_of_several_rows_is_never_taken_for_a_fresh_one(kind: str, effort: Effort) -> None:
    chance = effort.random()
    transport = slots(1)
    with InferenceServer(double, transport, max_batch_size=2):
        client = client_of(transport, kind)
        for turn in range(effort.times(300, stress=3000)):
            values = range(10 * turn, 10 * turn + chance.randrange(ROWS + 1)) if turn % 4 else None
            try:
                reply = call(client, ask_for(values), (0.0, chance.uniform(0, 0.001), HANG)[turn % 3])
            except TimeoutError:
                continue
            assert is_reply(reply, values)


def test_requests_of_one_tick_may_have_one_row_or_many_or_none() -> None:
    transport = slots(16)
    values: list[Sequence[float] | None] = [[1, 2, 3], None, [], [4], None, range(5, 11), [], *[None] * 9]

    async def ask() -> None:
        clients = transport.async_clients(16)
        for turn in range(20):
            order = values[turn % 16 :] + values[: turn % 16]
            calls = [client(ask_for(some)) for client, some in zip(clients, order, strict=True)]
            async with asyncio.timeout(HANG):
                replies = await asyncio.gather(*calls)
            for reply, some in zip(replies, order, strict=True):
                assert is_reply(reply, some)

    with InferenceServer(double, transport) as server:
        asyncio.run(ask())
        assert server.stats().ok == 320


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_without_rows_waits_for_no_pass(kind: str) -> None:
    """Also the first one of its process: its client makes the reply, and the server counts it."""
    model = GatedModel()
    transport = slots()
    with InferenceServer(model, transport) as server:
        busy = transport.client().submit(request(0))
        assert model.entered.wait(HANG)
        reply = call(client_of(transport, kind), request_of())
        assert is_reply(reply, [])
        assert reply["policy_version"].shape == (0,)
        model.open()
        assert is_reply(busy.result(HANG), None)
        eventually(lambda: server.stats().ok == 2)
    assert model.batches == [[0]]


# -- split over passes -------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Adds its bias, once its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.entered, self.gate = threading.Event(), threading.Event()

    def forward(self, observation: Tensor) -> Tensor:
        self.entered.set()
        assert self.gate.wait(HANG)
        return observation + self.bias


def test_rows_that_are_split_over_passes_have_the_version_that_computed_each() -> None:
    model = Gated()
    transport = slots()
    policy = TensorDictModule(model, in_keys=["observation"], out_keys=["action"])
    with InferenceServer(policy, transport, max_batch_size=4) as server, ThreadPoolExecutor(1) as pool:
        reply = transport.client().submit(request_of(*range(6)))
        assert model.entered.wait(HANG)
        update = pool.submit(server.update_weights, {"module.bias": torch.tensor(100.0)})
        eventually(lambda: has_pending_job(server))
        model.gate.set()
        update.result(HANG)
        rows = reply.result(HANG)
        assert rows["policy_version"].tolist() == [0, 0, 0, 0, 1, 1]
        assert rows["action"][:, 0].tolist() == [0, 1, 2, 3, 104, 105]


def test_a_part_of_a_request_shares_a_pass_with_rows_of_another_transport() -> None:
    """Its reply is then written to its slot beside the parts that were computed there."""
    model = GatedModel()
    transport, local = slots(), ThreadingTransport()
    with InferenceServer(model, [transport, local], max_batch_size=4) as server:
        split = transport.client().submit(request_of(*range(1, 7)))
        assert model.entered.wait(HANG)
        whole, single = local.client().submit(request_of(7)), local.client().submit(request(0))
        eventually(lambda: server.stats().pending == 4)
        model.open()
        reply = split.result(HANG)
        assert is_reply(reply, range(1, 7))
        assert torch.equal(reply["policy_version"], torch.zeros(6, dtype=torch.int64))
        assert is_reply(whole.result(HANG), [7])
        assert is_reply(single.result(HANG), None)
    assert model.batches == [[1, 2, 3, 4], [5, 6, 7, 0]]


# -- other processes ---------------------------------------------------------------------------------------


def is_right(reply: TensorDictBase, values: Sequence[float]) -> bool:
    """Whether a reply is that of ``answer``."""
    return torch.equal(reply["action"], answer(request_of(*values))["action"])


def ask_for_rows(line: Connection[Any, Any], clients: list[Any], identity: int, seed: int) -> None:
    """Ask for any number of rows with each client, on and on, and check every reply; say so once each has had one."""
    chance = random.Random(seed)
    for turn in count():
        for client in clients:
            values = [10_000.0 * identity + chance.randrange(10_000) for _ in range(chance.randrange(1, ROWS + 1))]
            reply = client(request_of(*values), HANG)
            if not is_right(reply, values):
                line.send(f"{values} were answered with {reply['action']}")
        if turn == 0:
            line.send("asks")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_clients_that_are_killed_with_rows_under_way_change_nothing_for_the_others(effort: Effort) -> None:
    chance = effort.random()
    transport = slots(6)
    steady = Child("fork", ask_always, transport.clients(2), 1)
    with steady, InferenceServer(answer, transport, max_batch_size=4) as server:
        for kill in range(effort.times(10, stress=100)):
            with Child("fork", ask_for_rows, transport.clients(4), 2 + kill, kill) as victim:
                assert victim.hear() == "asks"
                threading.Event().wait(chance.uniform(0, 0.01))  # orders nothing: any moment
                assert not victim.line.poll(), victim.line.recv()
            eventually(lambda: transport.free_slots == 4)
        steady.goes_on()
        steady.end()
        assert is_right(transport.client()(request_of(1, 2), HANG), [1, 2])
        assert server.stats().failed == 0


def make_double() -> Callable[[TensorDictBase], TensorDictBase]:
    return double


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_server_in_a_process_of_its_own_and_clients_by_address_take_rows() -> None:
    transport = slots()
    handed = transport.client()
    with ProcessInferenceServer(make_double, transport, ctx="fork"), connect(transport.address, timeout=HANG) as remote:
        for client in (handed, remote.client()):
            assert client.max_rows == ROWS
            assert is_reply(client(request_of(1, 2, 3), HANG), [1, 2, 3])
            assert is_reply(client(request_of(), HANG), [])
            assert is_reply(client(request(0), HANG), None)


def test_a_client_that_was_made_for_other_slots_is_told_so() -> None:
    """By a server that listens at the address of the one before, with slots of more rows."""
    old = slots()
    client, address = old.client(), old.address
    old.hand_off().close()
    new = ProcessSlotTransport(request(0), double(request(0)), num_slots=4, rows=ROWS + 1, address=address)
    with InferenceServer(double, new), pytest.raises(InvalidRequestError, match=r"slots of 7 rows.* slots of 6 rows"):
        client(request(0), HANG)
