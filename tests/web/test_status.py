from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount
from tensordict.nn import TensorDictModule
from torch import nn
from websockets.asyncio.client import connect

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.web import create_app
from tests.limits import HANG
from tests.web.hosting import hosted

ROW = {"observation": [1.0, 2.0, 3.0, 4.0]}


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[InferenceServer, httpx.AsyncClient]]:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(policy, ThreadingTransport()) as server:
        transport = httpx.ASGITransport(create_app(server, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=HANG) as client:
            yield server, client


async def page() -> httpx.Response:
    async with serving() as (_, client):
        return await client.get("/")


async def test_the_page_is_one_file_that_needs_nothing_else() -> None:
    text = (await page()).text
    for reference in re.findall(r"""(?:src|href|action|srcset)\s*=\s*["']?([^"'>]+)""", text):
        assert reference.startswith("data:"), reference
    assert not re.search(r"url\(|@import|import\(|<iframe|<object|<embed|<base", text)
    addresses = set(re.findall(r"[a-z]+://[^\s'\"<>)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace: nothing is fetched from there
    assert re.findall(r"fetch\(([^,]+),", text) == ["`${BASE}stats`"]


async def test_the_page_may_do_only_what_it_is_written_to_do() -> None:
    response = await page()
    policy = response.headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        (inline,) = re.findall(f"<{kind}>(.*?)</{kind}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"<[^>]*\s(style|on[a-z]+)\s*=", response.text.split("<script>")[0]), "it would be ignored"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["content-type"].startswith("text/html")


async def test_the_page_writes_what_it_is_told_as_text() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", (await page()).text)


async def test_the_page_can_be_read_aloud() -> None:
    text = (await page()).text
    assert '<html lang="en">' in text
    assert text.count("aria-live") + text.count('role="status"') == 1
    for table in re.findall(r"<table[^>]*>", text):
        (title,) = re.findall(r'aria-labelledby="([^"]+)"', table)
        assert f'id="{title}"' in text
    for field in re.findall(r'<input id="([^"]+)"', text):
        assert f'<label for="{field}">' in text


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


async def test_what_is_written_can_be_read_in_both_colour_schemes() -> None:
    schemes = re.findall(r":root \{(.*?)\}", (await page()).text, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for text in ("text", "muted", "accent", "good", "fair", "bad"):
            for ground in ("page", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


async def test_the_figures_are_those_of_the_server() -> None:
    async with serving(name="walker") as (server, client):
        for _ in range(3):
            await client.post("/act", json=ROW)
        await client.post("/act", content=b"{")
        response = await client.get("/stats")
        stats = response.json()
        expected = server.stats()
    assert response.headers["cache-control"] == "no-store"
    assert stats["name"] == "walker"
    assert (stats["ready"], stats["reason"], stats["policy_version"]) == (True, "", 0)
    assert stats["uptime_seconds"] >= 0
    assert stats["front"]["requests"] == {"act": {"ok": 3, "invalid": 1}}
    assert stats["front"]["inflight_requests"] == stats["front"]["inflight_bytes"] == 0
    assert stats["front"]["request"]["p99"] >= stats["front"]["request"]["p50"] > 0
    assert stats["server"]["ok"] == stats["server"]["totals"]["ok"] == expected.ok == 3
    assert stats["server"]["batches"] == {str(reason): count for reason, count in expected.batches.items()}
    assert stats["server"]["batch_sizes"] == {"1": 3}
    assert stats["server"]["forward"]["p50"] == expected.forward.p50
    assert stats["health"]["ready"]


async def test_a_server_that_was_shut_down_is_not_ready() -> None:
    async with serving() as (server, client):
        await server.aclose()
        stats = (await client.get("/stats")).json()
    assert not stats["ready"]
    assert "shut down" in stats["reason"]


async def test_the_page_needs_no_token_and_the_figures_do() -> None:
    async with serving(tokens=["right"]) as (_, client):
        assert (await client.get("/")).status_code == 200
        refused = await client.get("/stats")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/stats", headers={"authorization": "Bearer right"})).status_code == 200


async def test_the_page_and_robots_share_a_path_also_under_a_prefix() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(policy, ThreadingTransport()) as server:
        app = Starlette(routes=[Mount("/policy", create_app(server, metadata={"robot": "arm"}))])
        async with hosted(app) as url, httpx.AsyncClient(base_url=url, timeout=HANG) as client:
            response = await client.get("/policy/")
            assert response.status_code == 200
            assert "<title>aioinfer</title>" in response.text
            async with connect(f"{url.replace('http', 'ws')}/policy/", compression=None, open_timeout=HANG) as robot:
                assert b"robot" in await robot.recv(decode=False)
                stats = (await client.get("/policy/stats")).json()
                assert stats["front"]["connections"] == {"openpi": 1}
