"""Requests and replies that are larger than what a socket holds, so that they travel in pieces."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, MPTransport, ServerClosedError
from aioinfer.testing import GatedModel, double, eventually, request
from tests.process_workers import HANG, KINDS, clients_of

BIG = 1_000_000  # floats: 20 sockets full
SOON = HANG / 5


class Calling:
    """Clients of one kind that share a connection, each called from a thread or a task of its own."""

    def __init__(self, transport: MPTransport, kind: str, count: int, run: Any) -> None:
        self.clients = clients_of(transport, count, blocking=kind == "blocking")
        self._kind = kind
        self._run = run

    def call(self, index: int, td: TensorDictBase, timeout: float | None = None) -> Future[TensorDictBase]:
        client = self.clients[index]

        async def wait() -> TensorDictBase:
            async with asyncio.timeout(timeout):
                reply: TensorDictBase = await client(td)
            return reply

        future: Future[TensorDictBase] = (
            self._run.submit(client, td, timeout) if self._kind == "blocking" else self._run.start_task_soon(wait)
        )
        return future


@contextmanager
def calling(transport: MPTransport, kind: str, count: int) -> Iterator[Calling]:
    with ThreadPoolExecutor(8) if kind == "blocking" else start_blocking_portal() as run:
        yield Calling(transport, kind, count, run)


@pytest.mark.parametrize("kind", KINDS)
def test_large_requests_and_replies_of_many_clients_find_their_callers(kind: str) -> None:
    transport = MPTransport()
    with InferenceServer(double, transport), calling(transport, kind, 4) as callers:
        for turn in range(3):
            replies = [callers.call(index, request(10 * turn + index, size=BIG)) for index in range(4)]
            for index, reply in enumerate(replies):
                assert bool((reply.result(HANG)["action"] == 2 * (10 * turn + index)).all())


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_a_large_request_arrives_while_another_caller_of_its_process_waits(kind: str) -> None:
    transport = MPTransport()
    model = GatedModel()
    with InferenceServer(model, transport) as server, calling(transport, kind, 2) as callers:
        first = callers.call(0, request(1))
        assert model.entered.wait(HANG)
        second = callers.call(1, request(2, size=BIG))
        try:
            eventually(lambda: server.stats().pending == 1, within=SOON)
        finally:
            model.open()
            assert first.result(HANG)["action"][0] == 2
            assert second.result(HANG)["action"][0] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_request_that_is_given_up_half_way_changes_nothing_for_the_next(kind: str) -> None:
    model = GatedModel()
    transport = MPTransport()
    with InferenceServer(model, transport), calling(transport, kind, 2) as callers:
        first = callers.call(1, request(0))
        assert model.entered.wait(HANG)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                callers.call(0, request(1, size=BIG), 0.01).result(HANG)
        model.open()
        assert bool((callers.call(0, request(3, size=BIG)).result(HANG)["action"] == 6).all())
        assert first.result(HANG)["action"][0] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drain", [False, True], ids=["at once", "drained"])
def test_large_requests_end_when_the_server_shuts_down_before_they_are_there(drain: bool, kind: str) -> None:
    model = GatedModel()
    transport = MPTransport()
    with InferenceServer(model, transport) as server, calling(transport, kind, 3) as callers:
        first = transport.client().submit(request(0))
        assert model.entered.wait(HANG)
        calls = [callers.call(index, request(1, size=BIG), SOON) for index in range(3)]
        eventually(lambda: transport._board.lines.__len__() == 2)
        closing = threading.Thread(target=server.shutdown, args=(HANG,), kwargs={"drain": drain})
        closing.start()
        model.open()
        closing.join(HANG)
        assert first.result(HANG)["action"][0] == 0
        for call in calls:
            error = call.exception(HANG)
            assert error is None or isinstance(error, ServerClosedError)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drain", [False, True], ids=["at once", "drained"])
def test_large_replies_arrive_though_the_server_shuts_down_meanwhile(drain: bool, kind: str) -> None:
    transport = MPTransport()
    model = GatedModel(lambda td: TensorDict({"action": td["observation"][:, :1].repeat(1, BIG)}, td.batch_size))
    with InferenceServer(model, transport) as server, calling(transport, kind, 1) as callers:
        reply = callers.call(0, request(3), SOON)
        assert model.entered.wait(HANG)
        closing = threading.Thread(target=server.shutdown, args=(HANG,), kwargs={"drain": drain})
        closing.start()
        model.open()
        closing.join(HANG)
        assert bool((reply.result(HANG)["action"] == 3).all())
