from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.web.access import Access, Refusal
from aioinfer.web.app import create_app
from tests.limits import HANG
from tests.web.hosting import hosted
from tests.web.robots import act, robot, served

BODY = {"state": [3.0] * 8}


def status_of(access: Access, **headers: bytes) -> int:
    try:
        access.check_page({name.encode(): value for name, value in headers.items()})
    except Refusal as refusal:
        return refusal.status
    return 200


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:80", b"127.0.0.1:8000", b"10.1.2.3", b"[::1]", b"[fe80::1]:8000", b"robots:1"]
)
def test_addresses_localhost_and_allowed_names_are_taken(host: bytes) -> None:
    access = Access(hosts=["Robots"])
    assert status_of(access, host=host) == 200
    assert status_of(access, host=host, origin=b"http://" + host) == 200
    assert status_of(access, host=host, origin=b"http://evil.example") == 403


@pytest.mark.parametrize(
    "host",
    [b"", b":80", b"evil.example", b"localhost.evil.example", b"[", b"]", b"[::1", b"\xff\xfe", b"1.2.3", b"\x00"],
)
def test_other_hosts_are_refused(host: bytes) -> None:
    assert status_of(Access(), host=host) == 421
    assert status_of(Access()) == 421
    assert status_of(Access(hosts=None), host=host) == 200


@pytest.mark.parametrize("origin", [b"", b"null", b"http://[", b"http://]", b"\xff", b"http://", b"http://localhost:1"])
def test_foreign_and_odd_origins_are_refused(origin: bytes) -> None:
    assert status_of(Access(), host=b"localhost", origin=origin) == 403
    assert status_of(Access(hosts=None), origin=origin) == 403
    assert (
        status_of(Access(origins=["https://Page.example/"]), host=b"localhost", origin=b"https://page.example") == 200
    )


async def test_without_names_any_host_is_taken_where_there_are_tokens_only() -> None:
    for tokens, status in (((), 421), (("secret",), 200)):
        app = create_app(InferenceServer(act, ThreadingTransport()), tokens=tokens)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://any.example") as http:
            assert (await http.get("/healthz")).status_code == status


async def test_a_token_is_needed_but_for_probes_and_the_page() -> None:
    async with served(tokens=["other", "secret"]) as (_, url), httpx.AsyncClient(base_url=url, timeout=HANG) as http:
        for path in ("/", "/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert (await http.get(path)).status_code == 200
        for path in ("/stats", "/metrics", "/v2", "/v2/models/policy", "/unknown"):
            assert (await http.get(path)).status_code == 401
        for given in (None, "secret", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret", "Bearer \xff"):
            headers = [] if given is None else [(b"Authorization", given.encode("latin-1"))]
            reply = await http.post("/act", json=BODY, headers=headers)
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert "token" in reply.json()["error"]
        for given in ("Bearer secret", "bearer  secret", "Api-Key other"):
            assert (await http.post("/act", json=BODY, headers={"Authorization": given})).status_code == 200


async def test_websockets_are_refused_with_the_same_statuses() -> None:
    async with served(tokens=["secret"], hosts=[]) as (app, url):
        token = {"Authorization": "Bearer secret"}
        for path in ("/", "/v1/stream", "/openpi/policy"):
            where = url.replace("http", "ws") + path
            for headers, origin, status in (({}, None, 401), (token, "http://evil.example", 403)):
                with pytest.raises(InvalidStatus) as refused:
                    await connect(where, additional_headers=headers, origin=origin, open_timeout=HANG)  # type: ignore[arg-type]
                assert refused.value.response.status_code == status
                assert ("www-authenticate" in refused.value.response.headers) == (status == 401)
        async with robot(url, additional_headers=token) as one:
            await one.act(2)
        await app.drain()
        with pytest.raises(InvalidStatus) as refused:
            await connect(where, additional_headers=token, open_timeout=HANG)
        assert refused.value.response.status_code == 503


@pytest.mark.parametrize("outer", [FastAPI, Starlette])
async def test_all_of_it_works_under_a_prefix(outer: type[Starlette]) -> None:
    async with InferenceServer(act, ThreadingTransport()) as server:
        app = outer()
        app.mount("/policy", create_app(server))
        async with hosted(app) as url, httpx.AsyncClient(base_url=f"{url}/policy", timeout=HANG) as http:
            for path in ("/", "/healthz", "/livez", "/readyz", "/stats", "/metrics", "/v2", "/v2/models/policy"):
                assert (await http.get(path)).status_code == 200, path
            assert (await http.post("/act", json=BODY)).json()["actions"][0] == [6.0] * 7
            unknown, method = await http.get("/unknown"), await http.get("/act")
            assert (unknown.status_code, list(unknown.json())) == (404, ["error"])
            assert (method.status_code, list(method.json()), method.headers["allow"]) == (405, ["error"], "POST")
            for path in ("/", "/any", "/v1/realtime/robot/openpi"):
                async with robot(url, f"/policy{path}") as one:
                    assert one.metadata == {}
