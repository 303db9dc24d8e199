"""A policy in a web backend: ``docs/examples/web.py`` behind a real uvicorn on loopback."""

import asyncio
import importlib.util
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import uvicorn

from aioinfer import InferenceServer, MPTransport, ProcessInferenceServer, connect
from aioinfer.serve.listener import bind
from aioinfer.testing import GatedModel, double
from aioinfer.web import create_app
from tests.hosted import make_double
from tests.limits import HANG

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "web.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("web_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # FastAPI looks up annotations there
    spec.loader.exec_module(module)
    return module


web = load_example()


@dataclass
class Backend:
    """A backend that runs, and what the tests need to see of it."""

    policy: GatedModel
    server: InferenceServer
    port: int
    http: httpx.AsyncClient
    _tasks: list[asyncio.Task[httpx.Response]] = field(default_factory=list)

    async def act(self, value: float) -> httpx.Response:
        return await self.http.post("/policy/act", json={"observation": [value] * 4})

    def act_soon(self, value: float) -> asyncio.Task[httpx.Response]:
        self._tasks.append(asyncio.create_task(self.act(value)))
        return self._tasks[-1]

    async def hold_a_batch(self, value: float) -> asyncio.Task[httpx.Response]:
        """Send a request and keep it in the forward pass until the policy's gate is opened."""
        held = self.act_soon(value)
        await until(self.policy.entered.is_set)
        return held

    async def until_pending(self, count: int) -> None:
        await until(lambda: self.server.stats().pending == count)


def answer(value: float, size: int) -> dict[str, Any]:
    return {"action": [value] * size, "policy_version": 0}


async def until(condition: Callable[[], bool]) -> None:
    """Poll until something holds that no event tells of."""
    async with asyncio.timeout(HANG):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """Run an app on a port of loopback."""
    (listening,) = bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    serving = asyncio.create_task(uvicorn_server.serve(sockets=[listening]))
    try:
        await until(lambda: uvicorn_server.started or serving.done())
        assert uvicorn_server.started
        yield port
    finally:
        uvicorn_server.should_exit = True
        await serving
        listening.close()


def browser(port: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=HANG, limits=limits)


@asynccontextmanager
async def backend(max_pending: int = 256) -> AsyncIterator[Backend]:
    policy = GatedModel()
    app = web.make_app(policy, max_pending=max_pending)
    async with served(app) as port, browser(port) as http:
        try:
            yield Backend(policy, app.state.server, port, http)
        finally:
            policy.open()


async def test_concurrent_http_requests_meet_in_a_batch_and_get_their_own_replies() -> None:
    async with backend() as at:
        first = await at.hold_a_batch(0.0)
        others = [at.act_soon(float(value)) for value in range(1, 17)]
        await at.until_pending(16)
        at.policy.open()
        replies = await asyncio.gather(first, *others)
        stats = at.server.stats()
    assert [reply.status_code for reply in replies] == [200] * 17
    assert [reply.json() for reply in replies] == [answer(2.0 * value, 4) for value in range(17)]
    assert stats.ok == 17
    assert sum(stats.batches.values()) == 2


async def test_overload_is_answered_with_429_and_retry_after_and_the_others_are_served() -> None:
    async with backend(max_pending=1) as at:
        held = await at.hold_a_batch(1.0)
        pending = at.act_soon(2.0)
        await at.until_pending(1)
        refused = await at.act(3.0)
        at.policy.open()
        served = await asyncio.gather(held, pending)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "max_pending=1" in refused.json()["error"]
    assert [reply.status_code for reply in served] == [200, 200]
    assert at.policy.batches == [[1.0], [2.0]]


async def test_a_request_whose_connection_is_closed_while_it_waits_is_never_computed() -> None:
    async with backend() as at:
        held = await at.hold_a_batch(1.0)
        body = json.dumps({"observation": [2.0] * 4}).encode()
        head = f"POST /policy/act HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        _, connection = await asyncio.open_connection("127.0.0.1", at.port)
        connection.write(head.encode() + body)
        await at.until_pending(1)
        connection.close()
        await connection.wait_closed()
        await at.until_pending(0)
        at.policy.open()
        assert (await held).json() == answer(2.0, 4)
        assert (await at.act(3.0)).json() == answer(6.0, 4)
        stats = at.server.stats()
    assert at.policy.batches == [[1.0], [3.0]]
    assert (stats.ok, stats.cancelled) == (2, 1)


async def test_a_cancelled_http_request_is_never_computed_and_costs_its_neighbours_nothing() -> None:
    async with backend() as at:
        held = await at.hold_a_batch(1.0)
        before, leaving, after = at.act_soon(2.0), at.act_soon(3.0), at.act_soon(4.0)
        await at.until_pending(3)
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving
        await at.until_pending(2)
        at.policy.open()
        replies = await asyncio.gather(held, before, after)
    assert [reply.json()["action"][0] for reply in replies] == [2.0, 4.0, 8.0]
    assert at.policy.seen == {1.0, 2.0, 4.0}


async def test_a_connection_closed_during_its_forward_pass_costs_nobody_else_a_reply() -> None:
    async with backend() as at:
        leaving = await at.hold_a_batch(1.0)
        staying = [at.act_soon(2.0), at.act_soon(3.0)]
        await at.until_pending(2)
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving
        at.policy.open()
        replies = await asyncio.gather(*staying)
    assert [reply.json()["action"][0] for reply in replies] == [4.0, 6.0]


async def test_a_request_of_wrong_shape_gets_400_and_never_meets_the_others() -> None:
    async with backend() as at:
        at.policy.open()
        refused = await at.http.post("/policy/act", json={"observation": [1.0, 2.0]})
        served = await at.act(1.0)
    assert refused.status_code == 400
    assert '"observation" has shape [2], requests to this server have [4]' in refused.json()["error"]
    assert served.status_code == 200
    assert at.policy.batches == [[1.0]]


async def test_a_server_that_is_shut_down_gives_503() -> None:
    async with backend() as at:
        await at.server.aclose()
        assert (await at.act(1.0)).status_code == 503


async def test_a_server_that_pauses_gives_503_and_retry_after() -> None:
    async with backend() as at:
        at.policy.open()
        async with at.server.paused("reject"):
            refused = await at.act(1.0)
        served = await at.act(1.0)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert served.status_code == 200


async def test_a_server_in_another_process_that_is_killed_gives_503_until_the_next_one_listens(tmp_path: Path) -> None:
    address = str(tmp_path / "policy")
    body = {"observation": [1.0] * 3}
    async with (
        ProcessInferenceServer(make_double, MPTransport(address=address), ctx="forkserver") as server,
        served(create_app(await asyncio.to_thread(connect, address))) as port,
        browser(port) as http,
    ):
        before = await http.post("/act", json=body)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        while (killed := await http.post("/act", json=body)).status_code == 200:
            pass
        after_its_death = await http.post("/act", json=body)
        with InferenceServer(double, MPTransport(address=address)):
            again = await http.post("/act", json=body)
    assert before.json() == answer(2.0, 3)
    assert (killed.status_code, after_its_death.status_code) == (503, 503)
    assert again.json() == answer(2.0, 3)


async def test_a_handler_of_the_backend_asks_the_same_server() -> None:
    async with backend() as at:
        at.policy.open()
        assert (await at.http.get("/episode")).json() == {"distance": 0.0}
        assert at.server.stats().ok == 10
