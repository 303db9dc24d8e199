"""The Open Inference Protocol: what it says of the server, and tensors of all kinds, as JSON and as bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.web.app import create_app
from tests.limits import HANG

LENGTH = "inference-header-content-length"
INFER = "/v2/models/policy/infer"
DATATYPES = {
    "BOOL": np.bool_,
    **{f"INT{8 * size}": np.dtype(f"i{size}").type for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": np.dtype(f"u{size}").type for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"f{size}").type for size in (2, 4, 8)},
}
VALUES = {"b": [True, False, True], "i": [1, -2, 100], "u": [1, 2, 200], "f": [0.5, -2.0, 1e4]}


def same(td: TensorDictBase) -> TensorDictBase:
    """Return what was asked, under other names."""
    return TensorDict({f"{name}_out": value for name, value in td.items()}, td.batch_size)


class Asked:
    """Answers to requests, by a policy that this class serves."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def get(self, path: str) -> tuple[int, Any]:
        response = await self.http.get(path)
        return response.status_code, response.json()

    async def post(self, content: bytes, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return await self.http.post(INFER, content=content, headers=headers)

    async def infer(self, *inputs: Any, **message: Any) -> Any:
        """Ask by JSON alone; return that of the reply."""
        response = await self.post(json.dumps({"inputs": inputs, **message}).encode())
        assert response.status_code == 200, response.text
        return response.json()

    async def infer_binary(self, inputs: Mapping[str, Any], **message: Any) -> tuple[Any, bytes]:
        """Ask by bytes; return the JSON of the reply, and what is behind it."""
        tensors = [binary_tensor(name, array) for name, array in inputs.items()]
        head = json.dumps({"inputs": tensors, **message}).encode()
        data = b"".join([array.tobytes() for array in inputs.values()])
        response = await self.post(head + data, {LENGTH: str(len(head))})
        assert response.status_code == 200, response.text
        end = int(response.headers.get(LENGTH, len(response.content)))
        return json.loads(response.content[:end]), response.content[end:]

    async def refused(self, *inputs: Any, **message: Any) -> str:
        """Ask what is malformed; return what is said of it."""
        return await self.refused_bytes(json.dumps({"inputs": inputs, **message}).encode())

    async def refused_bytes(self, content: bytes, headers: Mapping[str, str] | None = None) -> str:
        response = await self.post(content, headers)
        assert (response.status_code, list(response.json())) == (400, ["error"]), response.text
        return str(response.json()["error"])


@asynccontextmanager
async def asking(
    policy: Callable[[TensorDictBase], TensorDictBase] = same, spec: TensorDict | None = None, **options: Any
) -> AsyncIterator[Asked]:
    async with InferenceServer(policy, ThreadingTransport(), request_spec=spec) as server:
        transport = httpx.ASGITransport(create_app(server, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=HANG) as http:
            yield Asked(http)


def tensor(data: Any, shape: Any = (1, 3), datatype: Any = "FP32", name: str = "a", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data, **more}


def binary_tensor(name: str, array: Any) -> dict[str, Any]:
    datatype = next(datatype for datatype, kind in DATATYPES.items() if array.dtype == kind)
    parameters = {"binary_data_size": array.nbytes}
    return {"name": name, "shape": array.shape, "datatype": datatype, "parameters": parameters}


def outputs(reply: Any) -> dict[str, Any]:
    return {output["name"]: output for output in reply["outputs"]}


# -- what it says of the server ---------------------------------------------------------------------------------


async def test_the_server_and_its_model_say_what_they_are() -> None:
    async with asking(name="walker") as to:
        assert await to.get("/v2/health/live") == (200, {"live": True})
        assert await to.get("/v2/health/ready") == (200, {"live": True, "ready": True, "name": "walker"})
        status, server = await to.get("/v2")
        assert (status, server["name"]) == (200, "aioinfer")
        assert "binary_tensor_data" in server["extensions"]
        assert await to.get("/v2/") == (200, server)
        for path in ("/v2/models/walker", "/v2/models/walker/versions/1"):
            status, model = await to.get(path)
            assert (status, model["name"], model["versions"], model["platform"]) == (200, "walker", ["1"], "pytorch")
            assert (await to.get(f"{path}/ready"))[0] == 200


async def test_the_layout_of_tensors_is_told_once_a_request_was_answered() -> None:
    async with asking() as to:
        assert (await to.get("/v2/models/policy"))[1]["outputs"] == []
        await to.infer(tensor([1, 2, 3]))
        _, model = await to.get("/v2/models/policy")
        assert model["inputs"] == [{"name": "a", "datatype": "FP32", "shape": [-1, 3]}]
        assert {"name": "a_out", "datatype": "FP32", "shape": [-1, 3]} in model["outputs"]


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/policy/versions/2", "/v2/repository"])
async def test_what_is_not_there_is_404_and_says_what_is(path: str) -> None:
    async with asking() as to:
        for suffix in ("", "/ready", "/infer"):
            status, reply = await to.get(path + suffix)
            assert (status, "'policy'" in reply["error"]) == (404, True)
        assert (await to.http.post(f"{path}/infer", content=b"{}")).status_code == 404


# -- tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", DATATYPES)
async def test_each_datatype_goes_both_ways(datatype: str) -> None:
    values: Any = np.array([VALUES[np.dtype(DATATYPES[datatype]).kind]]).astype(DATATYPES[datatype])
    async with asking() as to:
        reply, data = await to.infer_binary({"a": values}, parameters={"binary_data_output": True})
        output = outputs(reply)["a_out"]
        assert (output["datatype"], output["shape"]) == (datatype, [1, 3])
        assert output["parameters"] == {"binary_data_size": values.nbytes}
        assert data.startswith(values.tobytes())
        reply, data = await to.infer_binary({"a": values})
        assert (outputs(reply)["a_out"]["data"], data) == (values[0].tolist(), b"")
        if datatype != "FP16":
            for given in (values[0].tolist(), values.tolist()):  # flat, and nested
                output = outputs(await to.infer(tensor(given, datatype=datatype)))["a_out"]
                assert (output["datatype"], output["data"]) == (datatype, values[0].tolist())


async def test_numbers_are_rounded_as_numpy_rounds_them() -> None:
    numbers = [0.1, 1 / 3, 1e-45, 3.4028234e38, -0.0, 16777217, True, 2**60 + 1, -1e-320]
    async with asking() as to:
        for datatype in ("FP32", "FP64"):
            output = outputs(await to.infer(tensor(numbers, (1, 9), datatype)))["a_out"]
            kind = DATATYPES[datatype]
            assert np.array(output["data"], kind).tobytes() == np.array(numbers, kind).tobytes()


async def test_bytes_and_json_mix() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    head = json.dumps({"inputs": [tensor([1, 2, 3], name="state"), binary_tensor("image", image)]}).encode()
    async with asking() as to:
        response = await to.post(head + image.tobytes(), {LENGTH: str(len(head))})
        found = outputs(response.json())
        assert (found["state_out"]["data"], found["image_out"]["data"]) == ([1, 2, 3], [0, 1, 2, 3, 4, 5])
        assert found["image_out"]["shape"] == [1, 2, 3]


async def test_one_chooses_the_outputs_and_which_of_them_are_bytes() -> None:
    inputs = {"a": np.ones((1, 2), np.float32), "b": np.zeros((1, 3), np.int64)}
    chosen = [{"name": "b_out", "parameters": {"binary_data": True}}, {"name": "a_out"}]
    async with asking() as to:
        reply, data = await to.infer_binary(inputs, outputs=chosen)
        assert list(outputs(reply)) == ["b_out", "a_out"]
        assert (outputs(reply)["a_out"]["data"], data) == ([1, 1], bytes(24))
        chosen = [{"name": "b_out"}, {"name": "a_out", "parameters": {"binary_data": False}}]
        reply, data = await to.infer_binary(inputs, outputs=chosen, parameters={"binary_data_output": True})
        assert (outputs(reply)["a_out"]["data"], data) == ([1, 1], bytes(24))
        reply, _ = await to.infer_binary(inputs, outputs=[])
        assert {"a_out", "b_out"} <= set(outputs(reply))


@pytest.mark.parametrize("request_id", ["7", "", 'a"b\\ \u00e9'])
async def test_the_id_comes_back(request_id: str) -> None:
    async with asking() as to:
        assert (await to.infer(tensor([1, 2, 3]), id=request_id))["id"] == request_id
        reply, _ = await to.infer_binary({"a": np.ones((1, 3))}, id=request_id, parameters={"binary_data_output": True})
        assert reply["id"] == request_id
        assert "id" not in await to.infer(tensor([1, 2, 3]))


async def test_several_rows_are_answered_by_as_many() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    async with asking(spec=TensorDict({"a": torch.zeros(2)})) as to:
        output = outputs(await to.infer(tensor(rows.tolist(), (3, 2))))["a_out"]
        assert (output["shape"], output["data"]) == ([3, 2], [0, 1, 2, 3, 4, 5])
        reply, data = await to.infer_binary({"a": rows}, parameters={"binary_data_output": True})
        assert outputs(reply)["a_out"]["shape"] == [3, 2]
        assert data.startswith(rows.tobytes())


async def test_names_with_dots_are_entries_of_entries() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"out": TensorDict({"twice": 2 * td["camera", "left"]}, td.batch_size)}, td.batch_size)

    async with asking(policy) as to:
        assert outputs(await to.infer(tensor([1, 2, 3], name="camera.left")))["out.twice"]["data"] == [2, 4, 6]
        assert "camera" in await to.refused(tensor([1, 2, 3], name="camera"), tensor([1, 2, 3], name="camera.left"))


async def test_numbers_that_are_not_finite_are_null_and_bfloat16_is_fp32() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        strange = torch.tensor([[1.0, float("nan"), float("-inf")]])
        return TensorDict({"strange": strange, "half": strange.bfloat16(), "none": torch.zeros(1, 0)}, [1])

    async with asking(policy) as to:
        found = outputs(await to.infer(tensor([1, 2, 3])))
        assert found["strange"]["data"] == found["half"]["data"] == [1, None, None]
        assert found["half"]["datatype"] == "FP32"
        assert (found["none"]["shape"], found["none"]["data"]) == ([1, 0], [])


async def test_an_output_that_the_protocol_lacks_is_an_error_of_the_policy() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"complex": torch.zeros(1, 2, dtype=torch.complex64), "a": torch.zeros(1)}, [1])

    async with asking(policy) as to:
        response = await to.post(json.dumps({"inputs": [tensor([1, 2, 3])]}).encode())
        assert (response.status_code, "complex64" in response.json()["error"]) == (500, True)
        await to.infer(tensor([1, 2, 3]), outputs=[{"name": "a"}])


# -- what is malformed ------------------------------------------------------------------------------------------

BROKEN = {
    "no inputs": {},
    "inputs that are none": {"inputs": 1},
    "no input": {"inputs": []},
    "an input that is none": {"inputs": [1]},
    "no name": {"inputs": [{"shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]},
    "a name twice": {"inputs": [tensor([1, 2, 3]), tensor([1, 2, 3])]},
    "unlike rows": {"inputs": [tensor([1, 2, 3]), tensor([1, 2, 3, 4], (2, 2), name="b")]},
    "an unknown datatype": {"inputs": [tensor(["a", "b", "c"], datatype="BYTES")]},
    "a datatype that is none": {"inputs": [tensor([1, 2, 3], datatype={})]},
    "FP16 in JSON": {"inputs": [tensor([1, 2, 3], datatype="FP16")]},
    "no data": {"inputs": [{"name": "a", "shape": [1, 3], "datatype": "FP32"}]},
    "data that are none": {"inputs": [tensor("abc")]},
    "too few numbers": {"inputs": [tensor([1, 2])]},
    "too many numbers": {"inputs": [tensor([1, 2, 3, 4])]},
    "ragged lists": {"inputs": [tensor([[1, 2], [3]])]},
    "texts": {"inputs": [tensor(["a", "b", "c"])]},
    "objects": {"inputs": [tensor([{}, {}, {}])]},
    "too large for FP32": {"inputs": [tensor([1e39, 0, 0])]},
    "too large for FP64": {"inputs": [tensor([10**400, 0, 0], datatype="FP64")]},
    "too large for INT8": {"inputs": [tensor([128, 0, 0], datatype="INT8")]},
    "below 0 for UINT8": {"inputs": [tensor([-1, 0, 0], datatype="UINT8")]},
    "no shape": {"inputs": [{"name": "a", "datatype": "FP32", "data": []}]},
    "a shape of nothing": {"inputs": [tensor(1, [])]},
    "a shape below 0": {"inputs": [tensor([1, 2, 3], [1, -3])]},
    "a shape that is none": {"inputs": [tensor([1, 2, 3], [1, 3.0])]},
    "a shape of truth values": {"inputs": [tensor([1], [True, True])]},
    "too many dimensions": {"inputs": [tensor([1], [1] * 9)]},
    "a shape beyond all memory": {"inputs": [tensor([], [0, 2**31 - 1, 2**31 - 1, 2**31 - 1])]},
    "an unknown output": {"inputs": [tensor([1, 2, 3])], "outputs": [{"name": "other"}]},
    "outputs that are none": {"inputs": [tensor([1, 2, 3])], "outputs": 1},
    "an output without a name": {"inputs": [tensor([1, 2, 3])], "outputs": [{}]},
    "an id that is none": {"inputs": [tensor([1, 2, 3])], "id": 7},
    "parameters that are none": {"inputs": [tensor([1, 2, 3])], "parameters": []},
    "parameters of an input that are none": {"inputs": [tensor([1, 2, 3], parameters=[])]},
    "a timeout that is none": {"inputs": [tensor([1, 2, 3])], "parameters": {"timeout": "soon"}},
    "a sequence that is none": {"inputs": [tensor([1, 2, 3])], "parameters": {"sequence_id": [1]}},
    "bytes that are not there": {"inputs": [{**tensor(None), "parameters": {"binary_data_size": 12}}]},
    "another number of bytes": {"inputs": [{**tensor(None), "parameters": {"binary_data_size": 11}}]},
    "a number of bytes that is none": {"inputs": [{**tensor(None), "parameters": {"binary_data_size": "12"}}]},
}


async def test_what_is_malformed_is_told_and_fails_alone() -> None:
    async with asking(spec=TensorDict({"a": torch.zeros(3)})) as to:
        for what, message in BROKEN.items():
            assert await to.refused_bytes(json.dumps(message).encode()), what
            assert outputs(await to.infer(tensor([1, 2, 3])))["a_out"]["data"] == [1, 2, 3]


async def test_bytes_that_are_not_what_the_head_says_are_told() -> None:
    array = np.ones((1, 3), np.float32)
    head = json.dumps({"inputs": [binary_tensor("a", array)]}).encode()
    whole = head + array.tobytes()
    async with asking() as to:
        for length in ("", "x", "-1", "0", str(len(whole) + 1), "9" * 30, "1", str(len(head) - 1), str(len(head) + 1)):
            assert await to.refused_bytes(whole, {LENGTH: length}), length
        assert await to.refused_bytes(whole)
        assert "are left" in await to.refused_bytes(whole + b"1", {LENGTH: str(len(head))})
        assert "are there" in await to.refused_bytes(whole[:-1], {LENGTH: str(len(head))})
        for _ in range(2):  # what is kept of a head keeps nothing of the faults
            assert (await to.post(whole, {LENGTH: str(len(head))})).status_code == 200
