"""A server embedded in an event loop: how it starts, ends and starts again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from aioinfer import (
    InferenceServer,
    ServerClosedError,
    ThreadingTransport,
)
from aioinfer.testing import GatedModel, double, eventually, request
from tests.limits import HANG


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG):
        while not condition():  # noqa: ASYNC110 - what happens in other threads sets no event of this loop
            await asyncio.sleep(0.001)


async def test_leaving_the_block_ends_the_callers_that_remain() -> None:
    model = GatedModel()
    server = InferenceServer(model, ThreadingTransport())
    async with server:
        client = server.async_client()
        first = asyncio.ensure_future(client(request(0)))
        await until(model.entered.is_set)
        second = asyncio.ensure_future(client(request(1)))
        await until(lambda: server.stats().pending == 1)
        closing = asyncio.ensure_future(server.aclose(HANG))
        with pytest.raises(ServerClosedError):
            await second
        model.open()
        assert (await first)["action"][0] == 0
        await closing
    with pytest.raises(ServerClosedError):
        await client(request(2))


async def test_a_server_serves_again_in_the_same_loop() -> None:
    server = InferenceServer(double, ThreadingTransport())
    client = server.async_client()
    for value in range(3):
        async with server:
            assert (await client(request(value)))["action"][0] == 2 * value


async def test_aclose_gives_up_on_a_model_that_hangs() -> None:
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport()) as server:
        reply = server.async_client().submit(request(0))
        await until(model.entered.is_set)
        await server.aclose(timeout=0.01)
        with pytest.raises(ServerClosedError):
            await reply
        assert server.is_alive
        with pytest.raises(RuntimeError, match="has not ended"):
            await server.__aenter__()
        model.open()
        await until(lambda: not server.is_alive)


async def test_a_cancelled_aclose_shuts_down_all_the_same() -> None:
    model = GatedModel()
    async with InferenceServer(model, ThreadingTransport()) as server:
        reply = server.async_client().submit(request(0))
        await until(model.entered.is_set)
        closing = asyncio.ensure_future(server.aclose(None))
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        with pytest.raises(ServerClosedError):
            await reply
        model.open()
        await until(lambda: not server.is_alive)


@pytest.mark.parametrize("ticks", range(12))
async def test_cancelling_the_start_at_any_moment_leaves_nothing(ticks: int) -> None:
    server = InferenceServer(double, ThreadingTransport())
    starting = asyncio.ensure_future(server.__aenter__())
    for _ in range(ticks):
        await asyncio.sleep(0)
    starting.cancel()
    try:
        await starting
    except asyncio.CancelledError:
        pass
    await server.aclose()
    assert not server.is_alive


def test_a_loop_that_goes_down_takes_its_server_along() -> None:
    servers: list[InferenceServer] = []

    async def main() -> None:
        servers.append(await InferenceServer(double, ThreadingTransport()).__aenter__())

    asyncio.run(main())
    eventually(lambda: not servers[0].is_alive)
    with pytest.raises(ServerClosedError):
        servers[0].client()(request(1), HANG)
