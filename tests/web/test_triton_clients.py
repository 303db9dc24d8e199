"""Triton's clients over HTTP, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.web import create_app
from tests.limits import HANG
from tests.web.hosting import hosted

pytest.importorskip("tritonclient.http")

from tritonclient import http
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

T = TypeVar("T")


async def in_thread(action: Callable[[], T]) -> T:
    """Run what blocks beside the server."""
    async with asyncio.timeout(HANG):
        return await asyncio.to_thread(action)


def double(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": 2 * td["observation"]}, td.batch_size)


@asynccontextmanager
async def served(prefix: str = "", **options: Any) -> AsyncIterator[str]:
    """A server that takes rows of two numbers; returns where, as these clients say it."""
    spec = TensorDict({"observation": np.zeros(2, np.float32)}, [])
    async with InferenceServer(double, ThreadingTransport(), request_spec=spec) as server:
        app: Any = create_app(server, **options)
        if prefix:
            app = Starlette(routes=[Mount(prefix, app)])
        async with hosted(app) as url:
            yield url.removeprefix("http://") + prefix


def tensor(kind: Any, *values: float, binary: bool = True) -> Any:
    rows = np.array([[value, 0.0] for value in values], np.float32)
    made = kind.InferInput("observation", list(rows.shape), "FP32")
    made.set_data_from_numpy(rows, binary_data=binary)
    return made


def check(result: Any, *values: float) -> None:
    assert result.as_numpy("action")[:, 0].tolist() == [2 * value for value in values]


@pytest.mark.parametrize("prefix", ["", "/policy"])
async def test_the_blocking_client(prefix: str) -> None:
    def use(client: http.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("policy")
        assert not client.is_model_ready("another")
        assert client.get_server_metadata()["name"]
        for binary in (True, False):
            outputs = [http.InferRequestedOutput("action", binary_data=binary)]
            for encoding in (None, "gzip", "deflate"):
                result = client.infer(
                    "policy",
                    [tensor(http, 1, 2, 3, binary=binary)],
                    outputs=outputs,
                    request_id="seven",
                    request_compression_algorithm=encoding,
                )
                check(result, 1, 2, 3)
                assert result.get_response()["id"] == "seven"
        check(client.infer("policy", [tensor(http, 4)], model_version="1"), 4)
        check(client.infer("policy", [tensor(http, 5)], sequence_id=9, sequence_start=True, sequence_end=True), 5)
        pending = [client.async_infer("policy", [tensor(http, value)]) for value in range(20)]
        for value, one in enumerate(pending):
            check(one.get_result(), value)
        assert client.get_model_metadata("policy")["inputs"][0]["name"] == "observation"

    async with served(prefix) as url:
        with await in_thread(lambda: http.InferenceServerClient(url, concurrency=4)) as client:
            await in_thread(lambda: use(client))


async def test_the_awaitable_client() -> None:
    async with served() as url, aio.InferenceServerClient(url) as client, asyncio.timeout(HANG):
        assert await client.is_server_live()
        assert await client.is_model_ready("policy")
        results = await asyncio.gather(*[client.infer("policy", [tensor(aio, value)]) for value in range(20)])
        for value, result in enumerate(results):
            check(result, value)
        with pytest.raises(InferenceServerException, match="there is nothing at"):
            await client.infer("another", [tensor(aio, 1)])


async def test_errors_are_told() -> None:
    def use(client: http.InferenceServerClient) -> None:
        token = {"Authorization": "Bearer secret"}
        wrong = http.InferInput("observation", [1, 3], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 3), np.float32))
        with pytest.raises(InferenceServerException) as refused:
            client.infer("policy", [wrong], headers=token)
        assert refused.value.status() == "400"
        with pytest.raises(InferenceServerException, match="needs a token"):
            client.infer("policy", [tensor(http, 1)], headers={"Authorization": "Bearer another"})
        check(client.infer("policy", [tensor(http, 1)], headers=token), 1)

    async with served(tokens=["secret"]) as url:
        with await in_thread(lambda: http.InferenceServerClient(url)) as client:
            await in_thread(lambda: use(client))
