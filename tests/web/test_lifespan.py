from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import GatedModel, double
from aioinfer.web.app import App, create_app
from tests.hosted import forked, make_double, raise_error
from tests.limits import HANG
from tests.web.hosting import hosted
from tests.web.robots import until

OBSERVATION = {"observation": [1.0, 2.0, 3.0]}


async def ask(url: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=HANG) as client:
        return await client.post(f"{url}/act", json=OBSERVATION)


async def is_served(url: str) -> bool:
    reply = await ask(url)
    return reply.status_code == 200 and reply.json()["action"] == [2.0, 4.0, 6.0]


async def refusal(url: str) -> str:
    reply = await ask(url)
    assert reply.status_code == 503, reply.text
    return str(reply.json()["error"])


class Lifespan:
    """The lifespan of an app, as an ASGI server drives it."""

    def __init__(self, app: App) -> None:
        self._received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.ensure_future(app({"type": "lifespan"}, self._received.get, self._sent.put))

    async def tell(self, event: str) -> dict[str, Any]:
        self._received.put_nowait({"type": f"lifespan.{event}"})
        async with asyncio.timeout(HANG):
            answer: dict[str, Any] = await self._sent.get()
            return answer


# -- an app that runs alone --------------------------------------------------------------------------------


async def test_the_app_starts_the_server_and_ends_it() -> None:
    server = InferenceServer(double, ThreadingTransport())
    async with hosted(create_app(server)) as url:
        assert server.is_alive
        assert await is_served(url)
    assert not server.is_alive


async def test_the_app_starts_a_server_in_a_process_and_ends_it() -> None:
    server = forked(make_double)
    lifespan = Lifespan(app := create_app(server))
    assert await lifespan.tell("startup") == {"type": "lifespan.startup.complete"}
    async with hosted(app, lifespan="off") as url:
        assert await is_served(url)
    assert await lifespan.tell("shutdown") == {"type": "lifespan.shutdown.complete"}
    await lifespan.task
    assert not server.is_alive


async def test_a_server_that_runs_already_is_left_running() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server:
        for _ in range(2):
            async with hosted(create_app(server)) as url:
                assert await is_served(url)
            assert server.is_alive


async def test_a_process_that_does_not_start_is_told() -> None:
    server = forked(raise_error)
    lifespan = Lifespan(create_app(server))
    answer = await lifespan.tell("startup")
    assert answer["type"] == "lifespan.startup.failed"
    assert "there are no weights" in answer["message"]
    await lifespan.task


async def test_what_was_asked_before_the_shutdown_is_answered() -> None:
    model = GatedModel()
    app = create_app(InferenceServer(model, ThreadingTransport()))
    async with hosted(app) as url:
        first = asyncio.create_task(ask(url))
        await until(model.entered.is_set)
        lifespan = Lifespan(app)
        await lifespan.tell("startup")
        shutdown = asyncio.create_task(lifespan.tell("shutdown"))
        await until(lambda: bool(app.front.draining))
        assert await refusal(url)
        assert not first.done()
        assert not shutdown.done()
        model.open()
        assert (await first).status_code == 200
        assert await shutdown == {"type": "lifespan.shutdown.complete"}


# -- an app in another app ---------------------------------------------------------------------------------


async def test_a_mounted_app_uses_the_server_of_the_outer_one() -> None:
    server = InferenceServer(double, ThreadingTransport())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with server:
            yield

    outer = Starlette(routes=[Mount("/policy", app=create_app(server))], lifespan=lifespan)
    async with hosted(outer) as url:
        assert await is_served(f"{url}/policy")
    assert not server.is_alive


async def test_a_server_that_starts_later_and_ends_earlier_than_the_app() -> None:
    server = InferenceServer(double, ThreadingTransport())
    async with hosted(create_app(server), lifespan="off") as url:
        assert "does not run" in await refusal(url)
        async with server:
            assert await is_served(url)
        assert await refusal(url)
        async with server:
            assert await is_served(url)


async def test_requests_under_way_fail_when_the_server_ends() -> None:
    model = GatedModel()
    server = InferenceServer(model, ThreadingTransport(), max_batch_size=1)
    async with hosted(create_app(server), lifespan="off") as url, server:
        first = asyncio.create_task(ask(url))
        await until(model.entered.is_set)
        second = asyncio.create_task(ask(url))
        await until(lambda: server.stats().pending == 1)
        closing = asyncio.create_task(server.aclose(timeout=None))
        assert (await second).status_code == 503
        model.open()
        await closing
        assert (await first).status_code == 200


async def test_a_process_that_starts_later_and_dies_earlier_than_the_app() -> None:
    server = forked(make_double)
    async with hosted(create_app(server), lifespan="off") as url:
        assert "does not run" in await refusal(url)
        async with server:
            assert await is_served(url)
        assert await refusal(url)
