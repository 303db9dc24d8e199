from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import GatedModel
from aioinfer.web.app import App, create_app
from tests.limits import HANG
from tests.web.robots import act, until


@asynccontextmanager
async def probing(
    server: InferenceServer, tokens: tuple[str, ...] = ()
) -> AsyncIterator[tuple[App, httpx.AsyncClient]]:
    app = create_app(server, tokens=tokens)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=HANG) as http:
        yield app, http


async def test_a_server_that_runs_lives_and_is_ready_and_probes_need_no_token() -> None:
    async with InferenceServer(act, ThreadingTransport()) as server, probing(server, ("secret",)) as (_, http):
        health, live, ready = [await http.get(path) for path in ("/healthz", "/livez", "/readyz")]
        assert (await http.get("/stats")).status_code == 401
    assert (health.status_code, health.text) == (200, "OK\n")
    assert (live.status_code, live.json()) == (200, {"live": True})
    assert (ready.status_code, ready.json()) == (200, {"ready": True})


async def test_a_server_that_was_not_started_is_not_ready() -> None:
    async with probing(InferenceServer(act, ThreadingTransport())) as (_, http):
        for path in ("/livez", "/readyz"):
            reply = await http.get(path)
            assert reply.status_code == 503
            assert reply.json()["reason"] == "the server was not started"
        assert (await http.get("/healthz")).status_code == 200


async def test_a_server_that_was_shut_down_neither_lives_nor_is_ready() -> None:
    async with InferenceServer(act, ThreadingTransport()) as server:
        pass
    async with probing(server) as (_, http):
        for path in ("/livez", "/readyz"):
            reply = await http.get(path)
            assert reply.status_code == 503
            assert reply.json()["reason"]


async def test_probes_do_not_wait_for_a_pass_and_a_drain_is_seen_at_once() -> None:
    policy = GatedModel()
    async with InferenceServer(policy, ThreadingTransport()) as server, probing(server) as (app, http):
        held = asyncio.create_task(http.post("/act", json={"observation": [1.0]}))
        try:
            await until(policy.entered.is_set)
            assert [(await http.get(path)).status_code for path in ("/livez", "/readyz")] == [200, 200]
            draining = asyncio.create_task(app.drain())
            await until(lambda: bool(app.front.draining))
            ready, live = await http.get("/readyz"), await http.get("/livez")
            refused = await http.post("/act", json={"observation": [2.0]})
        finally:
            policy.open()
        assert (await held).status_code == 200
        await draining
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "reason": "the server is shutting down"})
    assert live.status_code == 200
    assert refused.status_code == 503
    assert policy.seen == {1.0}
