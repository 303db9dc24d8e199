from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from tensordict.nn import TensorDictModule
from torch import nn
from websockets.asyncio.client import connect

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.web import create_app
from tests.web.browser import EXECUTABLE, browsing
from tests.web.hosting import hosted

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(EXECUTABLE is None, reason="there is no chromium, chromium-browser or google-chrome here"),
]

SERVING = "document.body.dataset.state === 'serving'"
OVERFLOW = "document.scrollingElement.scrollWidth - innerWidth"
ARRAY = {b"__ndarray__": True, b"data": np.ones(4, np.float32).tobytes(), b"dtype": "<f4", b"shape": [4]}
OBSERVATION = msgpack.packb({"observation": ARRAY})


def server() -> InferenceServer:
    network = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 2))
    return InferenceServer(TensorDictModule(network, ["observation"], ["action"]), ThreadingTransport())


@asynccontextmanager
async def robots(url: str, number: int = 8) -> AsyncIterator[None]:
    """Robots that ask again and again."""

    async def drive(socket: Any) -> None:
        while True:
            await socket.send(OBSERVATION)
            await socket.recv()

    async with AsyncExitStack() as stack:
        address = url.replace("http", "ws")
        sockets = [await stack.enter_async_context(connect(address, compression=None)) for _ in range(number)]
        for socket in sockets:
            await socket.recv()  # the metadata
        driving = [asyncio.create_task(drive(socket)) for socket in sockets]
        try:
            yield
        finally:
            for task in driving:
                task.cancel()
            await asyncio.gather(*driving, return_exceptions=True)


async def starts(_: Request) -> JSONResponse:
    return JSONResponse({"error": "the policy is being loaded"}, 503)


def weights_of(server: InferenceServer) -> nn.Module:
    assert isinstance(server.model, nn.Module)
    return server.model


def text_of(name: str) -> str:
    return f"document.getElementById('{name}').textContent"


def above_zero(name: str) -> str:
    return f"parseFloat({text_of(name)}) > 0"


async def test_figures_change_under_load(tmp_path: Path) -> None:
    async with server() as served, hosted(create_app(served, name="walker")) as url, browsing(tmp_path) as page:
        await page.open(url)
        await page.until(SERVING)
        assert await page.evaluate(text_of("name")) == "walker"
        await page.until(f"{text_of('connections')} === '0' && {text_of('rate')} === '0'")
        async with robots(url):
            for name in ("rate", "reply", "batch", "wait", "connections"):
                await page.until(above_zero(name))
            await page.until(f"{text_of('connections')} === '8'")
            await page.until(
                "document.querySelector('#rate-line polyline').getAttribute('points').split(' ').length > 3"
            )
            await page.until("document.querySelectorAll('#sizes .bar').length > 0")
            assert await page.evaluate("document.querySelector('#sizes .bar').offsetWidth") > 0
            assert "openpi" in await page.evaluate(text_of("requests"))
        await page.until(f"{text_of('connections')} === '0'")
        await page.until(f"{text_of('rate')} === '0'")
        assert not page.errors
        assert not page.network_errors


async def test_a_policy_that_learns_shows_its_version(tmp_path: Path) -> None:
    async with server() as served, hosted(create_app(served)) as url, browsing(tmp_path) as page:
        await page.open(url)
        await page.until(f"{text_of('version')} === '0'")
        await served.aupdate_weights(weights_of(served), version=7)
        await page.until(f"{text_of('version')} === '7'")
        assert not page.errors


@pytest.mark.parametrize("width", [360, 768, 1280])
async def test_nothing_is_wider_than_the_screen(tmp_path: Path, width: int) -> None:
    name = "a_policy_with_a_name_that_is_longer_than_the_screen_of_a_phone_is_wide"
    async with server() as served, hosted(create_app(served, name=name)) as url, browsing(tmp_path) as page:
        await page.resize(width, 800)
        async with robots(url):
            await page.open(url)
            await page.until(above_zero("rate"))
            assert await page.evaluate("innerWidth") == width
            assert await page.evaluate(OVERFLOW) <= 0
            cut = "[...document.querySelectorAll('.card')].filter((one) => one.scrollWidth > one.clientWidth).length"
            assert await page.evaluate(cut) == 0


async def test_it_is_dark_for_who_prefers_that(tmp_path: Path) -> None:
    grounds = []
    async with server() as served, hosted(create_app(served)) as url, browsing(tmp_path) as page:
        await page.open(url)
        await page.until(SERVING)
        for scheme in ("light", "dark"):
            await page.prefer(scheme)
            colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            grounds.append(sum(map(int, re.findall(r"\d+", colour))))
    light, dark = grounds
    assert light > 600
    assert dark < 150


async def test_it_says_that_the_server_is_gone_and_goes_on_when_it_is_back(tmp_path: Path, port: int) -> None:
    async with browsing(tmp_path) as page:
        async with server() as served, hosted(create_app(served, name="first"), port=port) as url:
            await page.open(url)
            await page.until(SERVING)
        await page.until(f"{text_of('state')} === 'not reachable'")
        async with hosted(Starlette(routes=[Route("/stats", starts)]), port=port):
            await page.until(f"{text_of('state')} === 'not ready: the policy is being loaded'")
        async with server() as served, hosted(create_app(served, name="second"), port=port):
            await page.until(SERVING)
            assert await page.evaluate(text_of("name")) == "second"
            async with robots(url):
                await page.until(above_zero("rate"))
        assert not page.errors


async def test_it_says_why_a_server_is_not_ready(tmp_path: Path) -> None:
    async with server() as served, hosted(create_app(served)) as url, browsing(tmp_path) as page:
        await page.open(url)
        await page.until(SERVING)
        await served.aclose()
        await page.until("document.body.dataset.state === 'trouble'")
        assert "shut down" in await page.evaluate(text_of("state"))


async def test_it_asks_for_the_token_under_a_prefix_too(tmp_path: Path) -> None:
    submit = "document.getElementById('token').value = '{}'; document.querySelector('#login button').click()"
    hidden = "document.getElementById('{}').hidden"
    async with server() as served, browsing(tmp_path) as page:
        app = Starlette(routes=[Mount("/policies/one", create_app(served, tokens=["right"]))])
        async with hosted(app) as url:
            await page.open(f"{url}/policies/one/")
            await page.until(f"!{hidden.format('login')}")
            assert await page.evaluate(hidden.format("figures"))
            await page.evaluate(submit.format("wrong"))
            await page.until(f"!{hidden.format('refused')}")
            await page.evaluate(submit.format("right"))
            await page.until(SERVING)
            assert not await page.evaluate(hidden.format("figures"))
            await page.open(f"{url}/policies/one/")  # the token is kept as long as the tab
            await page.until(SERVING)
            assert not page.errors


async def test_it_asks_nothing_while_nobody_looks(tmp_path: Path) -> None:
    asked = "performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/stats')).length"
    async with server() as served, hosted(create_app(served)) as url, browsing(tmp_path) as page:
        await page.open(url)
        await page.until(SERVING)
        await page.evaluate(
            "Object.defineProperty(document, 'hidden', { get: () => window.covered, configurable: true });"
            "window.covered = true; document.dispatchEvent(new Event('visibilitychange'))"
        )
        before = await page.evaluate(asked)
        await page.evaluate("window.waited = 0; setTimeout(() => { window.waited = 1; }, 2500)")
        await page.until("window.waited === 1")
        assert await page.evaluate(asked) <= before + 1  # one may have been under way
        await page.evaluate("window.covered = false; document.dispatchEvent(new Event('visibilitychange'))")
        await page.until(f"{asked} > {before} + 1")


@pytest.fixture
def screenshots(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--screenshots")
    if folder is None:
        pytest.skip("only with --screenshots FOLDER")
    return Path(folder)


async def test_the_picture_of_the_documentation(tmp_path: Path, screenshots: Path) -> None:
    drawn = "document.querySelector('#rate-line polyline')?.getAttribute('points').split(' ').length"
    async with (
        server() as served,
        hosted(create_app(served, name="walker")) as url,
        robots(url, 24),
        browsing(tmp_path) as page,
    ):
        await page.open(url)
        await page.until(f"parseInt({text_of('rate-detail')}.replace(',', '')) > 5000")
        await page.resize(1080, 720)
        await page.open(url)
        await page.until(f"{drawn} >= 25")
        screenshots.joinpath("status.png").write_bytes(await page.screenshot())
