"""Requests that are asked together: each gets its own outcome, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from tensordict import TensorDict, TensorDictBase

from aioinfer import AsyncInferenceClient, InferenceServer, MPTransport, ThreadingTransport
from aioinfer.batching import Caller
from aioinfer.errors import ClientClosedError, InvalidRequestError, ModelError, ServerClosedError
from aioinfer.testing import GatedModel
from aioinfer.web.app import create_app
from aioinfer.web.front import Front
from aioinfer.web.plain_requests import PlainRequest, PlainRequests
from tests.web.robots import until


def double(td: TensorDictBase) -> TensorDictBase:
    assert (td["observation"] >= 0).all(), "below 0"
    return TensorDict({"action": 2 * td["observation"]}, td.batch_size)


class Asked(PlainRequest):
    """Keeps what it is answered with."""

    protocol = "test"

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__(0.0)
        self.breaks = breaks
        self.outcome: TensorDictBase | Exception | None = None
        self.answered = 0

    def prepare(self, outcome: TensorDictBase | Exception) -> None:
        assert self.outcome is None
        self.outcome = outcome

    def answer(self) -> None:
        assert self.outcome is not None
        self.answered += 1
        if self.breaks:
            raise RuntimeError("the connection is closed")


def entries(value: float) -> dict[str, Any]:
    return {"observation": np.full(2, value, np.float32)}


@asynccontextmanager
async def asking(
    model: Any = double, transport: Any = None, *, by_client: bool = False
) -> AsyncIterator[tuple[Front, PlainRequests]]:
    async with InferenceServer(model, transport or ThreadingTransport()) as server:
        app = create_app(server.async_client() if by_client else server)
        yield app.front, PlainRequests(app.front)
        assert app.front.stats.inflight == 0
        app.close()


@pytest.mark.parametrize("by_client", [False, True])
async def test_each_gets_its_own_outcome(by_client: bool) -> None:
    async with asking(by_client=by_client) as (front, plain):
        requests = [Asked() for _ in range(4)]
        for request, value in zip(requests, (1, -1, 2, 3), strict=True):
            plain.ask(request, entries(value), Caller())
        malformed = Asked()
        plain.ask(malformed, {"observation": [[1.0], [1.0, 2.0]]}, Caller())
        await until(lambda: all(request.answered for request in (*requests, malformed)))
        outcomes = [request.outcome for request in requests]
        assert isinstance(outcomes[1], ModelError | AssertionError)
        assert [float(one["action"][0]) for one in outcomes if isinstance(one, TensorDictBase)] == [2, 4, 6]
        assert isinstance(malformed.outcome, InvalidRequestError)
        assert dict(front.stats.requests) == {("test", "ok"): 3, ("test", "error"): 1, ("test", "invalid"): 1}


async def test_one_whose_answer_can_not_be_sent_harms_none_of_its_batch(caplog: pytest.LogCaptureFixture) -> None:
    model = GatedModel(double)
    async with asking(model) as (_, plain):
        plain.ask(first := Asked(), entries(1), Caller())
        await until(model.entered.is_set)
        requests = [Asked(breaks=number == 1) for number in range(4)]
        for value, request in enumerate(requests):
            plain.ask(request, entries(value), Caller())
        await asyncio.sleep(0)
        with caplog.at_level(logging.CRITICAL, "aioinfer.web"):
            model.open()
            await until(lambda: all(request.answered for request in (first, *requests)))
        assert [request.answered for request in requests] == [1, 1, 1, 1]


@pytest.mark.parametrize("make", [ThreadingTransport, MPTransport])
async def test_one_whose_caller_has_gone_is_neither_computed_nor_answered(make: Any) -> None:
    model = GatedModel(double)
    async with InferenceServer(model, make()) as server:
        app = create_app(server.async_client())
        front, plain = app.front, PlainRequests(app.front)
        plain.ask(first := Asked(), entries(1), Caller())
        await until(model.entered.is_set)
        plain.ask(gone := Asked(), entries(2), Caller())
        await until(lambda: server.stats().pending == 1)
        plain.ask(gone_at_once := Asked(), entries(3), Caller())
        for request in (gone, gone_at_once, gone):
            plain.cancel(request)
        await until(lambda: server.stats().pending == 0)
        plain.ask(last := Asked(), entries(4), Caller())
        model.open()
        await until(lambda: bool(first.answered and last.answered))
        assert model.seen == {1, 4}
        assert gone.outcome is gone_at_once.outcome is None
        assert dict(front.stats.requests) == {("test", "ok"): 2, ("test", "cancelled"): 2}
        plain.cancel(last)
        assert front.stats.requests["test", "cancelled"] == 2
        assert front.stats.inflight == 0
        app.close()


class Withdrawing(AsyncInferenceClient):
    """Withdraws what it is asked."""

    has_slot = False

    def submit(self, td: Any = None, **entries: Any) -> asyncio.Future[TensorDictBase]:
        future: asyncio.Future[TensorDictBase] = asyncio.get_running_loop().create_future()
        future.cancel()
        return future

    async def __call__(self, *_: Any, **__: Any) -> TensorDictBase:
        raise NotImplementedError


async def test_one_that_its_client_withdraws_is_told() -> None:
    app = create_app(Withdrawing())
    plain = PlainRequests(app.front)
    plain.ask(request := Asked(), entries(1), Caller())
    await until(lambda: bool(request.answered))
    assert isinstance(request.outcome, ClientClosedError)
    assert app.front.stats.inflight == 0


async def test_nothing_is_asked_of_an_app_that_is_drained() -> None:
    async with asking() as (front, plain):
        front.draining = "the server is shutting down"
        with pytest.raises(ServerClosedError):
            plain.ask(Asked(), entries(1), Caller())
