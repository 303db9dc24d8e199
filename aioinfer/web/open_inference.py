"""The Open Inference Protocol, version 2, over HTTP: JSON and binary tensors, as tritonclient speaks it.

https://github.com/kserve/open-inference-protocol and Triton's "binary tensor data" extension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from starlette.routing import BaseRoute
from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.web.arrays import MAX_DIMENSIONS
from aioinfer.web.asgi import Headers
from aioinfer.web.backend import PendingReply
from aioinfer.web.front import Front
from aioinfer.web.http import InferEndpoint, Response

__all__ = ["HEADER_LENGTH", "InferRequest", "OpenInferenceEndpoint", "decode", "encode", "open_inference_routes"]

HEADER_LENGTH = b"inference-header-content-length"
"""The header that says how many bytes of a body are JSON; tensors follow."""

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"INT{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


_OCTETS = (b"content-type", b"application/octet-stream")


class InferRequest(NamedTuple):
    """A request to infer.

    Attributes:
        entries: by name, each ``[n, ...]``, or one string.
        rows: ``n``.
        request_id: to be repeated in the reply.
        deadline: seconds.
        outputs: the entries that are asked for, in order, and whether each is to be binary; ``None``: all.
        binary: whether those of which nothing is said are.
    """

    entries: dict[str, Any]
    rows: int
    request_id: str | None
    deadline: float | None
    outputs: Mapping[str, bool | None] | None
    binary: bool


def decode(body: bytes, header_length: bytes | None) -> InferRequest:
    """Read a request.

    Args:
        body: JSON, and binary tensors behind it.
        header_length: the value of the header; ``None`` where there is none, and all is JSON.

    Raises:
        InvalidRequestError: it is malformed.
    """
    end = len(body) if header_length is None else _header_length(header_length, len(body))
    try:
        message = json.loads(body[:end] if end < len(body) else body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the request is no JSON: {error}") from None
    parameters = _parameters(message)
    inputs = message.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise InvalidRequestError('a request has "inputs", a list of at least one tensor')
    entries: dict[str, Any] = {}
    rows: int | None = None
    for tensor in inputs:
        if not isinstance(tensor, dict) or not isinstance(name := tensor.get("name"), str):
            raise InvalidRequestError("an input is an object with a name")
        if name in entries:
            raise InvalidRequestError(f"the input {name!r} is there twice")
        shape = _shape(tensor)
        if rows is None:
            rows = shape[0]
        elif shape[0] != rows:
            raise InvalidRequestError(f"the input {name!r} has {shape[0]} rows, those before it {rows}")
        size = _parameters(tensor).get("binary_data_size")
        if size is None:
            entries[name] = _from_json(name, tensor, shape)
        else:
            if type(size) is not int or not 0 <= size <= len(body) - end:
                raise InvalidRequestError(f"the input {name!r} has {size!r} bytes, {len(body) - end} are there")
            entries[name] = _from_bytes(name, tensor, shape, body, end, size)
            end += size
    if end != len(body):
        raise InvalidRequestError(f"{len(body) - end} bytes are left behind the last tensor")
    return InferRequest(
        entries,
        rows or 0,
        _request_id(message),
        _deadline(parameters),
        _outputs(message),
        parameters.get("binary_data_output") is True,
    )


def _header_length(value: bytes, size: int) -> int:
    if not value.isdigit() or not 0 < (length := int(value)) <= size:
        raise InvalidRequestError(f"the body has {size} bytes, of which {value.decode('latin-1')[:20]} can't be JSON")
    return length


def _parameters(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequestError(f"expected an object, got {type(message).__name__}")
    parameters = message.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"parameters are an object, got {type(parameters).__name__}")
    return parameters


def _shape(tensor: Mapping[str, Any]) -> list[int]:
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        raise InvalidRequestError(
            f"the shape of {tensor['name']!r} is a list of 1 to {MAX_DIMENSIONS} integers, of which the first is the "
            f"number of rows; got {str(shape)[:100]}"
        )
    return shape


def _dtype(tensor: Mapping[str, Any]) -> np.dtype[Any]:
    dtype = _DTYPES.get(str(tensor.get("datatype")))
    if dtype is None:
        raise InvalidRequestError(
            f"{tensor['name']!r} is of datatype {str(tensor.get('datatype'))[:20]!r}, not of {', '.join(_DTYPES)}"
        )
    return dtype


def _from_json(name: str, tensor: Mapping[str, Any], shape: list[int]) -> np.ndarray[Any, Any]:
    data = tensor.get("data")
    if not isinstance(data, list):
        raise InvalidRequestError(f'the input {name!r} has neither "data" nor "binary_data_size"')
    try:
        return np.array(data, _dtype(tensor)).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(
            f"the data of {name!r} is no {tensor['datatype']} of shape {shape}: {error}"
        ) from None


def _from_bytes(
    name: str, tensor: Mapping[str, Any], shape: list[int], body: bytes, start: int, size: int
) -> np.ndarray[Any, Any]:
    dtype = _dtype(tensor)
    if math.prod(shape) * dtype.itemsize != size:
        raise InvalidRequestError(f"the input {name!r} of {tensor['datatype']} {shape} can't have {size} bytes")
    return np.ndarray(shape, dtype, body, start)


def _request_id(message: Mapping[str, Any]) -> str | None:
    request_id = message.get("id")
    if not isinstance(request_id, str | None):
        raise InvalidRequestError(f"the id is a string, got {type(request_id).__name__}")
    return request_id


def _deadline(parameters: Mapping[str, Any]) -> float | None:
    timeout = parameters.get("timeout")
    if timeout is None:
        return None
    if type(timeout) not in (int, float) or not timeout > 0:
        raise InvalidRequestError(f"the timeout is a number of microseconds above 0, got {str(timeout)[:50]}")
    return float(timeout) / 1e6


def _outputs(message: Mapping[str, Any]) -> dict[str, bool | None] | None:
    outputs = message.get("outputs")
    if not outputs:
        return None
    if not isinstance(outputs, list) or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in outputs
    ):
        raise InvalidRequestError('"outputs" is a list of objects with a name')
    return {one["name"]: _parameters(one).get("binary_data") for one in outputs}


def make_rows(request: InferRequest) -> TensorDictBase | dict[str, Any]:
    """What is asked of the server: one row by name, or a TensorDict of several."""
    if request.rows == 1:
        return {name: value[0] for name, value in request.entries.items()}
    tensors = {name: torch.from_numpy(np.require(value, requirements="W")) for name, value in request.entries.items()}
    return TensorDict(tensors, batch_size=[request.rows])


def encode(request: InferRequest, model_name: str, reply: TensorDictBase) -> tuple[bytes, int | None]:
    """Write a reply.

    Args:
        request: that it answers.
        model_name: of this server.
        reply: of one row, or of as many as the request has.

    Returns:
        The body; and how many bytes of it are JSON, where tensors follow.

    Raises:
        InvalidRequestError: there is no output of a name that is asked for.
        ModelError: an output has no datatype of the protocol.
    """
    arrays = dict(_arrays(reply, reply.batch_dims == 0))
    names: Iterable[str] = arrays if request.outputs is None else request.outputs
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name in names:
        array = arrays.get(name)
        if array is None:
            raise InvalidRequestError(f"there is no output {name!r}, there are {', '.join(arrays)}")
        datatype = _NAMES.get(array.dtype)
        if datatype is None:
            raise ModelError(f"the output {name!r} has dtype {array.dtype}, of which the protocol knows nothing")
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
        binary = request.outputs.get(name) if request.outputs is not None else None
        if request.binary if binary is None else binary:
            tail.append(array.tobytes())
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    message: dict[str, Any] = {"model_name": model_name, "model_version": "1", "outputs": outputs}
    if request.request_id is not None:
        message["id"] = request.request_id
    head = json.dumps(message, allow_nan=False).encode()
    return (head, None) if not tail else (b"".join([head, *tail]), len(head))


def _arrays(reply: TensorDictBase, one: bool, above: str = "") -> Iterable[tuple[str, np.ndarray[Any, Any]]]:
    for name, value in reply.items():
        if isinstance(value, TensorDictBase):
            yield from _arrays(value, one, f"{above}{name}.")
        else:
            array = value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
            yield above + name, array[None] if one else array


class OpenInferenceEndpoint(InferEndpoint[InferRequest]):
    """``POST /v2/models/{name}/infer``."""

    protocol = "open-inference"

    def decode(self, headers: Headers, body: bytes) -> InferRequest:
        return decode(body, headers.get(HEADER_LENGTH))

    def submit(self, request: InferRequest, size: int, received_at: float) -> PendingReply:
        return self._front.submit(
            make_rows(request), protocol=self.protocol, size=size, received_at=received_at, deadline=request.deadline
        )

    def encode(self, request: InferRequest, reply: TensorDictBase) -> Response:
        body, head = encode(request, self._front.name, reply)
        return Response(body) if head is None else Response(body, (_OCTETS, (HEADER_LENGTH, b"%d" % head)))


def open_inference_routes(front: Front) -> list[BaseRoute]:
    """The six ``GET`` endpoints."""
    return []
