"""Slots that are used again: replies that are lent, and requests that were given up."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from aioinfer import (
    InferenceServer,
    MPTransport,
    connect,
)
from aioinfer.testing import GatedModel, double, eventually, request
from tests.limits import HANG
from tests.process_workers import KINDS, call, client_of
from tests.transports import process_slots

# -- lent replies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_address", [False, True], ids=["handed", "connected"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lent_reply_lies_in_the_slot_until_the_next_request_and_a_copy_never_changes(
    kind: str, by_address: bool
) -> None:
    transport = process_slots()
    with InferenceServer(double, transport):
        source = connect(transport.address, timeout=HANG) if by_address else transport
        lent, copied, other = (client_of(source, kind, copy=copy) for copy in (False, True, False))
        first, kept = call(lent, request(1)), call(copied, request(1))
        for value in range(2, 30):
            before = first["action"].clone()
            call(other, request(100 + value))
            assert torch.equal(first["action"], before)  # what others ask does not change it
            reply = call(lent, request(value))
            assert reply["action"].data_ptr() == first["action"].data_ptr()
            assert bool((first["action"] == 2 * value).all())
            again = call(copied, request(value))
            assert again["action"].data_ptr() != kept["action"].data_ptr()
            again["action"].fill_(-1)
            assert bool((kept["action"] == 2).all())


def test_a_lent_reply_outlives_its_client() -> None:
    transport = process_slots()
    with InferenceServer(double, transport):
        reply = call(transport.client(copy=False), request(3))
    del transport
    assert bool((reply["action"] == 6).all())


# -- requests that were given up ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_a_stale_reply_is_never_taken_for_a_fresh_one(make: Any, kind: str) -> None:
    chance = random.Random(4)
    transport = make()
    ended = dict.fromkeys(("reply", "timeout"), 0)
    with InferenceServer(double, transport):
        client = client_of(transport, kind)
        for value in range(300):
            try:
                reply = call(client, request(value), (0.0, chance.uniform(0, 0.001), HANG)[value % 3])
            except TimeoutError:
                ended["timeout"] += 1
            else:
                ended["reply"] += 1
                assert bool((reply["action"] == 2 * value).all())
    assert min(ended.values()) >= 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_a_request_that_was_given_up_in_its_forward_pass_leaves_its_client_usable_at_once(make: Any, kind: str) -> None:
    transport = make()
    for value in range(10):
        model = GatedModel()
        with InferenceServer(model, transport):
            client = client_of(transport, kind)
            with pytest.raises(TimeoutError):
                call(client, request(1000), 0.01)
            with ThreadPoolExecutor(1) as pool:
                reply = pool.submit(call, client, request(value))
                model.open()
                assert bool((reply.result(HANG)["action"] == 2 * value).all())


@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_futures_that_are_cancelled_at_any_moment_leave_their_clients_usable(make: Any) -> None:
    chance = random.Random(5)
    transport = make()
    with InferenceServer(double, transport) as server:
        clients = [transport.client() for _ in range(4)]
        for value in range(300):
            client = clients[value % 4]
            future = client.submit(request(value))
            if chance.random() < 0.5:
                eventually(lambda: server.stats().ok >= 0)  # spends a while
            future.cancel()
            reply = client(request(1000 + value), HANG)
            assert bool((reply["action"] == 2 * (1000 + value)).all())
