"""Malformed requests over HTTP, generated: each is refused as the caller's fault, and a good one is answered next."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.batching import Caller
from aioinfer.web import App, create_app
from tests.limits import HANG

ACT = b"/act"
INFER = b"/v2/models/policy/infer"
LENGTH = b"inference-header-content-length"


def double(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": 2 * td["observation"]}, td.batch_size)


NAMES = st.sampled_from(["observation", "session_id", "reset", "name", "data", "a.b", ""]) | st.text(max_size=3)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, 10**400, -1])
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
DATATYPES = st.sampled_from(["FP32", "FP16", "INT64", "BOOL", "BYTES", "BF16", "fp32", ""]) | VALUES
PARAMETERS = (
    st.fixed_dictionaries(
        {},
        optional={
            "binary_data_size": st.sampled_from([8, 16, 0, -8, 2**63]) | VALUES,
            "binary_data_output": VALUES,
            "binary_data": VALUES,
            "timeout": VALUES,
            "sequence_id": VALUES,
            "sequence_start": VALUES,
        },
    )
    | VALUES
)
TENSORS = (
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.just("observation") | VALUES,
            "datatype": st.just("FP32") | DATATYPES,
            "shape": st.just([1, 2]) | st.lists(NUMBERS, max_size=9) | VALUES,
            "data": st.just([1.0, 2.0]) | st.lists(NUMBERS, max_size=3) | VALUES,
            "parameters": PARAMETERS,
        },
    )
    | VALUES
)
INFERENCES = (
    st.fixed_dictionaries(
        {},
        optional={
            "id": VALUES,
            "inputs": st.lists(TENSORS, max_size=3) | VALUES,
            "outputs": st.lists(TENSORS, max_size=3) | VALUES,
            "parameters": PARAMETERS,
        },
    )
    | VALUES
)
OBSERVATIONS = st.fixed_dictionaries({"observation": VALUES}, optional={"session_id": VALUES, "reset": VALUES}) | VALUES
NESTED = st.integers(1, 100_000).map(lambda depth: b'{"observation":' + b"[" * depth + b"]" * depth + b"}")


@st.composite
def mutations(draw: st.DrawFn, good: bytes) -> bytes:
    message = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(message)))
        stop = min(len(message), start + draw(st.integers(0, 4)))
        message[start:stop] = draw(st.binary(max_size=4) | st.just(bytes(message[start:stop]) * 2))
    return bytes(message)


GOOD_TENSOR = {"name": "observation", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
GOOD_HEAD = json.dumps({"inputs": [GOOD_TENSOR]}).encode()
GOOD = GOOD_HEAD + np.ones(2, np.float32).tobytes()
BODIES = {
    ACT: OBSERVATIONS.map(lambda value: json.dumps(value).encode())
    | mutations(b'{"observation": [1.0, 2.0], "session_id": "a", "reset": true}')
    | st.binary(max_size=64)
    | NESTED,
    INFER: st.tuples(INFERENCES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=24)).map(b"".join)
    | INFERENCES.map(lambda value: json.dumps(value).encode())
    | mutations(GOOD)
    | st.binary(max_size=64)
    | NESTED,
}
LENGTHS = st.none() | st.just(str(len(GOOD_HEAD))) | st.integers(-1, 400).map(str) | st.text(max_size=3)


class Asker:
    """Asks an app in its own event loop, by requests that have come whole."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._caller = Caller()

    async def ask(self, path: bytes, body: bytes, length: str | None = None) -> tuple[int, Any]:
        headers = {b"host": b"localhost"} | ({} if length is None else {LENGTH: length.encode()})
        response: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

        def respond(status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
            response.set_result((status, body))

        self._app.answer(path, headers, body, self._caller, respond)
        async with asyncio.timeout(HANG):
            status, answer = await response
        return status, json.loads(answer) if status != 200 or path == ACT else answer

    async def try_one(self, path: bytes, body: bytes, length: str | None, number: int) -> None:
        status, answer = await self.ask(path, body, length)
        assert status in (200, 400), answer
        assert status == 200 or list(answer) == ["error"]
        good = await self.ask(ACT, b'{"observation": [%d, 0]}' % number)
        assert good == (200, {"action": [2.0 * number, 0.0], "policy_version": 0})
        assert self._app.front.bytes_in_flight.bytes == self._app.front.stats.inflight == 0


@pytest.mark.parametrize("path", [ACT, INFER])
def test_what_is_malformed_is_the_callers_fault_and_harms_nobody(path: bytes) -> None:
    spec = TensorDict({"observation": np.zeros(2, np.float32)}, [])
    server = InferenceServer(double, ThreadingTransport(), request_spec=spec)
    asker = Asker(create_app(server))
    numbers = iter(range(1, 1_000_000))

    with asyncio.Runner() as runner:
        runner.run(server.__aenter__())

        @hypothesis.settings(max_examples=1000, database=None)
        @hypothesis.given(BODIES[path], LENGTHS)
        def try_all(body: bytes, length: str | None) -> None:
            runner.run(asker.try_one(path, body, length, next(numbers)))

        try:
            try_all()
        finally:
            runner.run(server.aclose())
    assert next(numbers) >= 1000
