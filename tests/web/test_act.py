from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import GatedModel
from aioinfer.web.app import App, create_app
from tests.limits import HANG
from tests.web.robots import until


def double(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": 2 * td["observation"]}, td.batch_size)


@asynccontextmanager
async def acting(
    policy: Callable[[TensorDictBase], TensorDictBase] = double, spec: TensorDict | None = None, **options: Any
) -> AsyncIterator[tuple[App, httpx.AsyncClient]]:
    async with InferenceServer(policy, ThreadingTransport(), request_spec=spec) as server:
        app = create_app(server, **options)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=HANG
        ) as http:
            yield app, http


async def test_nested_lists_go_in_and_come_out() -> None:
    async with acting() as (_, http):
        reply = await http.post("/act", json={"observation": [[1.0, 2], [3, 4.5]]})
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"action": [[2.0, 4.0], [6.0, 9.0]], "policy_version": 0}


@pytest.mark.parametrize(
    ("given", "dtype"), [([1.0], torch.float32), ([1], torch.int64), ([True], torch.bool), (0.5, torch.float32)]
)
async def test_numbers_get_the_dtypes_that_clients_give_them(given: Any, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def policy(td: TensorDictBase) -> TensorDictBase:
        seen.append(td["observation"].dtype)
        return td

    async with acting(policy) as (_, http):
        assert (await http.post("/act", json={"observation": given})).status_code == 200
    assert seen == [dtype]


async def test_numbers_get_the_dtypes_of_the_request_spec() -> None:
    spec = TensorDict({"observation": torch.zeros(2, dtype=torch.float64), "image": torch.zeros(2, dtype=torch.uint8)})
    seen: list[Any] = []

    def policy(td: TensorDictBase) -> TensorDictBase:
        seen.extend([td["observation"].dtype, td["image"].dtype])
        return double(td)

    async with acting(policy, spec) as (_, http):
        assert (await http.post("/act", json={"observation": [1, 2], "image": [255, 0]})).status_code == 200
        for body in ({"observation": [1, 2], "image": [256, 0]}, {"observation": [1], "image": [1, 1]}, {}):
            refused = await http.post("/act", json=body)
            assert (refused.status_code, list(refused.json())) == (400, ["error"])
    assert seen == [torch.float64, torch.uint8]


async def test_entries_that_the_policy_does_not_read_are_left_out() -> None:
    policy = TensorDictModule(nn.Linear(2, 2), in_keys=["observation"], out_keys=["action"])
    async with acting(policy) as (_, http):
        reply = await http.post("/act", json={"observation": [1.0, 2.0], "note": {"any": [None, "thing"]}})
        missing = await http.post("/act", json={"note": 1})
    assert reply.status_code == 200
    assert missing.status_code == 400


async def test_texts_and_nested_entries_go_both_ways() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        (prompt,) = td["prompt"]
        outputs = {
            "said": NonTensorStack(NonTensorData(prompt.upper())),
            "deep": TensorDict({"twice": 2 * td["camera", "left"]}, [1]),
            "half": torch.ones(1, 2, dtype=torch.bfloat16),
            "column": torch.arange(4.0).reshape(1, 2, 2).transpose(1, 2),
        }
        return TensorDict(outputs, [1])

    async with acting(policy) as (_, http):
        reply = await http.post("/act", json={"prompt": "grasp", "camera": {"left": [1, 2]}})
    assert reply.json() == {
        "said": "GRASP",
        "deep": {"twice": [2, 4]},
        "half": [1.0, 1.0],
        "column": [[0.0, 2.0], [1.0, 3.0]],
        "policy_version": 0,
    }


async def test_numbers_that_are_not_finite_are_null() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        return TensorDict(
            {"action": torch.tensor([[1.0, float("nan"), float("inf")]]), "value": torch.tensor([float("-inf")])}, [1]
        )

    async with acting(policy) as (_, http):
        reply = await http.post("/act", json={"observation": 1.0})
    assert reply.json() == {"action": [1.0, None, None], "value": None, "policy_version": 0}


async def test_an_output_that_json_lacks_is_an_error_of_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"wave": torch.ones(1, 2, dtype=torch.complex64)}, [1])

    async with acting(policy) as (_, http):
        reply = await http.post("/act", json={"observation": 1.0})
    assert reply.status_code == 500
    assert "JSON can't carry the reply" in reply.json()["error"]
    assert len(caplog.records) == 1


async def test_a_session_starts_with_its_first_request_and_anew_with_a_reset() -> None:
    class Policy:
        in_keys = ("observation", "is_init")

        def __call__(self, td: TensorDictBase) -> TensorDictBase:
            return TensorDict({"started": td["is_init"]}, td.batch_size)

    async with acting(Policy()) as (app, http):

        async def started(**more: Any) -> bool:
            reply = (await http.post("/act", json={"observation": [1.0], **more})).json()
            (found,) = reply["started"]
            return bool(found)

        assert [await started(session_id=name) for name in "aabab"] == [True, False, True, False, False]
        assert await started(session_id="a", reset=True)
        assert not await started(session_id="a", reset=False)
        for body in ({"session_id": 1}, {"session_id": ""}, {"session_id": "x" * 257}, {"session_id": "a", "reset": 1}):
            assert (await http.post("/act", json={"observation": [1.0], **body})).status_code == 400
        assert len(app.front.sessions) == 2


async def test_a_request_is_not_computed_after_its_deadline() -> None:
    policy = GatedModel(double)
    async with acting(policy) as (_, http):
        held = asyncio.create_task(http.post("/act", json={"observation": [1.0]}))
        try:
            await until(policy.entered.is_set)
            late = await http.post("/act", json={"observation": [2.0]}, headers={"X-Deadline-Seconds": "0.01"})
        finally:
            policy.open()
        assert (await held).status_code == 200
        soon = await http.post("/act", json={"observation": [3.0]}, headers={"X-Deadline-Seconds": "1000"})
    assert late.status_code == 504
    assert "0.01 seconds" in late.json()["error"]
    assert soon.status_code == 200
    assert policy.seen == {1.0, 3.0}


@pytest.mark.parametrize("value", ["", "0", "0.0", "-1", "nan", "inf", "1e400", "1_0", "soon", "1" * 400, "²"])
async def test_a_deadline_is_a_number_of_seconds(value: str) -> None:
    async with acting() as (_, http):
        reply = await http.post(
            "/act", json={"observation": [1.0]}, headers={b"X-Deadline-Seconds": value.encode("latin-1")}
        )
    assert (reply.status_code, list(reply.json())) == (400, ["error"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'{"observation": NaN}',
        b'{"observation": null}',
        b'{"observation": [1, [2]]}',
        b'{"observation": ["a"]}',
        b'{"observation": {}}',
        b'{"observation": 1' + 400 * b"0" + b"}",
        b'{"observation": ' + 500 * b"[" + 500 * b"]" + b"}",
        b'{"observation": ' + 900 * b'{"a":' + b"1" + 900 * b"}" + b"}",
        b'{"observation": "\xff"}',
        b'{"observation": "\\ud800"}',
    ],
)
async def test_malformed_requests_are_refused(body: bytes) -> None:
    async with acting() as (app, http):
        reply = await http.post("/act", content=body)
        assert (reply.status_code, list(reply.json())) == (400, ["error"])
        good = await http.post("/act", content=json.dumps({"observation": [1]}))
        assert good.json()["action"] == [2]
        assert app.front.bytes_in_flight.bytes == 0
