from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import double
from aioinfer.web import App, create_app
from tests.limits import HANG


@asynccontextmanager
async def asking(server: InferenceServer) -> AsyncIterator[tuple[App, httpx.AsyncClient]]:
    app = create_app(server, tokens=["secret"])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=HANG) as http:
        yield app, http
    app.close()


async def test_a_server_that_serves_is_alive_and_ready() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server, asking(server) as (_, http):
        assert (await http.get("/livez")).json() == {"live": True}
        assert (await http.get("/readyz")).json() == {"ready": True}
        healthy = await http.get("/healthz")
        assert (healthy.status_code, healthy.text) == (200, "OK\n")
        assert healthy.headers["content-type"].startswith("text/plain")


async def test_a_server_that_was_not_started_is_alive_and_not_ready() -> None:
    async with asking(InferenceServer(double, ThreadingTransport())) as (_, http):
        assert (await http.get("/livez")).status_code == 200
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the server was not started")
        assert ready.headers["retry-after"]
        healthy = await http.get("/healthz")
        assert (healthy.status_code, healthy.text) == (503, "the server was not started\n")


async def test_a_server_that_is_drained_is_alive_and_not_ready() -> None:
    async with InferenceServer(double, ThreadingTransport()) as server, asking(server) as (app, http):
        assert (await http.get("/readyz")).status_code == 200
        await app.drain()
        assert (await http.get("/livez")).status_code == 200
        ready = await http.get("/readyz")
        assert ready.status_code == 503
        assert "shutting down" in ready.json()["reason"]
