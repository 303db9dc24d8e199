"""Callers of ``connect("ws://...")`` that share a connection: what one of them asks costs the others nothing."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase

from aioinfer import InferenceError, InferenceServer, ModelError, RemoteServer, ThreadingTransport
from aioinfer.testing import GatedModel, double, request
from aioinfer.testing.callers import is_double
from aioinfer.web import create_app
from tests.limits import HANG
from tests.web.streams import ask_message, streaming
from tests.web.test_network_client import connected, reached
from tests.web.test_stream import entered, serving


@asynccontextmanager
async def shared(model: Any = double, **options: Any) -> AsyncIterator[RemoteServer]:
    """A server that is reached over one connection."""
    async with (
        InferenceServer(model, ThreadingTransport(), **options) as server,
        reached(create_app(server)) as url,
        await connected(url) as remote,
    ):
        yield remote


async def ask_together(remote: RemoteServer, *requests: TensorDictBase) -> list[Any]:
    """The outcomes of requests that travel in one message."""
    client = remote.async_client()
    async with asyncio.timeout(HANG):
        return await asyncio.gather(*map(client, requests), return_exceptions=True)


CALLS = {
    "a timeout without end": {"timeout": math.inf},
    "a timeout of a million years": {"timeout": 10**14},
    "a timeout that no message holds": {"timeout": 10**30},
    "a truth value that is none": {"timeout": HANG, "wait": 1},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
async def test_how_one_caller_waits_costs_no_other_its_reply(options: dict[str, Any]) -> None:
    model = GatedModel()
    async with shared(model) as remote:
        good, odd = remote.async_clients(2)
        first = good.submit(request(1))
        await entered(model)
        second = asyncio.create_task(odd(request(2), **options))
        await asyncio.sleep(0)
        model.open()
        async with asyncio.timeout(HANG):
            assert is_double(await first, 1)
            assert is_double(await second, 2)
            assert is_double(await good(request(3)), 3)


REQUESTS = {
    "a map whose keys are numbers": TensorDict({"observation": torch.ones(3), "note": NonTensorData({1: 2})}),
    "a list of such maps": TensorDict({"observation": torch.ones(3), "note": NonTensorData([{1: 2}])}),
    "many rows, and no tensor": TensorDict({}, [10**6]),
    "a tensor without elements": TensorDict({"observation": torch.zeros(0, 10**6)}),
    "many tensors and TensorDicts": TensorDict(
        {f"{index}": TensorDict({f"{part}": torch.ones(1) for part in range(5)}, [1]) for index in range(200)}
    ),
}


@pytest.mark.parametrize("odd", REQUESTS.values(), ids=REQUESTS)
async def test_what_one_caller_asks_costs_no_other_its_reply(odd: TensorDictBase) -> None:
    async with shared() as remote:
        outcomes = await ask_together(remote, request(1), request(2), odd)
        assert is_double(outcomes[0], 1)
        assert is_double(outcomes[1], 2)
        assert isinstance(outcomes[2], InferenceError | KeyError)


async def test_a_reply_that_can_not_be_read_costs_no_other_caller_its_own() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        reply = double(td)
        if (td["observation"] < 0).any():
            reply["note"] = NonTensorData({1: 2}, batch_size=reply.batch_size)
        return reply

    async with shared(model, max_batch_size=1) as remote:
        good, bad = await ask_together(remote, request(1), request(-1))
        assert is_double(good, 1)
        assert isinstance(bad, ModelError)


MESSAGES = {
    "that UTF-8 does not have": "\ud800",
    "that is long": "x" * 2**15,
}


@pytest.mark.parametrize("text", MESSAGES.values(), ids=MESSAGES)
async def test_errors_with_a_message_of_any_kind_arrive(text: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "aioinfer.web")  # reports of tests are UTF-8

    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            raise ValueError(text)
        return double(td)

    async with (
        serving(model, debug=True, split_failed_batches=False, max_batch_size=600) as service,
        streaming(service.url) as stream,
    ):
        await stream.socket.send(ask_message([-1] * 600))
        for number in range(600):
            assert type(await stream.outcome(number)) is ValueError
        await stream.socket.send(ask_message([1], first=600))
        assert is_double(await stream.outcome(600), 1)


async def test_an_error_whose_message_can_not_be_shown_arrives() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("nothing to be shown")

    def model(td: TensorDictBase) -> TensorDictBase:
        raise KeyError(Mute())

    async with serving(model) as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([1]))
        assert isinstance(await stream.outcome(0), KeyError | ModelError)


async def test_a_mode_that_the_server_does_not_know_costs_that_request() -> None:
    async with serving() as service, streaming(service.url) as stream:
        await stream.socket.send(ask_message([1], mode="of a later version"))
        await stream.outcome(0)
        assert not stream.malformed
