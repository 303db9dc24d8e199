"""The Open Inference Protocol, version 2, over HTTP: JSON and binary tensors, as tritonclient speaks it.

https://github.com/kserve/open-inference-protocol and Triton's "binary tensor data" extension.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.responses import Response as Response_
from starlette.routing import BaseRoute, Route
from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.tensors import entries as entries_of
from aioinfer.web.arrays import MAX_DIMENSIONS
from aioinfer.web.asgi import Headers
from aioinfer.web.backend import PendingReply
from aioinfer.web.front import Front
from aioinfer.web.http import InferEndpoint, Response, parse_json, to_json
from aioinfer.web.monitor import Monitor

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
_FORMATS = {np.dtype(np.float32): "f", np.dtype(np.float64): "d"}
"""Of lists of numbers that ``struct`` packs as NumPy would, in half of the time: what does not fit is an error."""

_VERSION = "1"
_LONGEST_CACHED = 4096  # bytes of JSON
_NO_SEQUENCE = (None, False, False)
_OCTETS = (b"content-type", b"application/octet-stream")


class InferRequest(NamedTuple):
    """A request to infer.

    Attributes:
        entries: by name, each ``[n, ...]``.
        rows: ``n``.
        request_id: to be repeated in the reply.
        deadline: seconds.
        outputs: the entries that are asked for, in order, and whether each is to be binary; ``None``: all.
        binary: whether those of which nothing is said are.
        sequence_id: the session whose request it is.
        sequence_start: whether that begins anew.
        sequence_end: whether it ends.
    """

    entries: dict[str, np.ndarray[Any, Any]]
    rows: int
    request_id: str | None
    deadline: float | None
    outputs: Mapping[str, bool | None] | None
    binary: bool
    sequence_id: str | None = None
    sequence_start: bool = False
    sequence_end: bool = False


class _Input(NamedTuple):
    """What the JSON of a request says of one tensor: ``data``, or how many bytes it has behind the JSON."""

    name: str
    dtype: np.dtype[Any]
    shape: Sequence[int]
    size: int | None
    data: Any


_Output: TypeAlias = tuple[str, np.dtype[Any], tuple[int, ...], bool]
"""What the JSON of a reply says of one tensor, but for its data: name, dtype, shape, and whether it is binary."""


class _Head(NamedTuple):
    """What the JSON of a request says."""

    inputs: Sequence[_Input]
    request_id: str | None
    deadline: float | None
    outputs: Mapping[str, bool | None] | None
    binary: bool
    sequence: tuple[str | None, bool, bool]


def decode(body: bytes, header_length: bytes | None) -> InferRequest:
    """Read a request.

    Args:
        body: JSON, and binary tensors behind it.
        header_length: the value of the header; ``None`` where there is none, and all is JSON.

    Raises:
        InvalidRequestError: it is malformed.
    """
    if header_length is None:
        end = len(body)
        head = _parse_head(body)
    else:
        end = _header_length(header_length, len(body))
        head = (_parse_head_once if end <= _LONGEST_CACHED else _parse_head)(body[:end])
    entries: dict[str, np.ndarray[Any, Any]] = {}
    for name, dtype, shape, size, data in head.inputs:
        if size is None:
            entries[name] = _from_json(name, data, dtype, shape)
        elif size > len(body) - end:
            raise InvalidRequestError(f"the input {name[:100]!r} has {size} bytes, {len(body) - end} are there")
        else:
            entries[name] = _from_bytes(name, dtype, shape, body, end)
            end += size
    if end != len(body):
        raise InvalidRequestError(f"{len(body) - end} bytes are left behind the last tensor")
    return InferRequest(
        entries, head.inputs[0].shape[0], head.request_id, head.deadline, head.outputs, head.binary, *head.sequence
    )


def _parse_head(head: bytes) -> _Head:
    message = parse_json(head)
    parameters = _parameters(message)
    inputs = message.get("inputs")
    if type(inputs) is not list or not inputs:
        raise InvalidRequestError('a request has "inputs", a list of at least one tensor')
    parsed = [_parse_input(tensor) for tensor in inputs]
    if len(parsed) > 1:
        _check_together(parsed)
    if not parameters:
        return _Head(parsed, _request_id(message), None, _outputs(message), False, _NO_SEQUENCE)
    return _Head(
        parsed,
        _request_id(message),
        _deadline(parameters),
        _outputs(message),
        parameters.get("binary_data_output") is True,
        _sequence(parameters),
    )


def _check_together(inputs: Sequence[_Input]) -> None:
    """Check that names differ, and that all have as many rows."""
    rows = inputs[0].shape[0]
    names = set()
    for one in inputs:
        if one.name in names:
            raise InvalidRequestError(f"the input {one.name[:100]!r} is there twice")
        if one.shape[0] != rows:
            raise InvalidRequestError(f"the input {one.name[:100]!r} has {one.shape[0]} rows, those before it {rows}")
        names.add(one.name)


_parse_head_once = lru_cache(maxsize=256)(_parse_head)
"""Callers of binary tensors repeat the JSON before them, byte for byte."""


def _parse_input(tensor: Any) -> _Input:
    if type(tensor) is not dict or type(name := tensor.get("name")) is not str:
        raise InvalidRequestError("an input is an object with a name")
    dtype, shape = _dtype(name, tensor), _shape(name, tensor)
    size = _parameters(tensor).get("binary_data_size") if "parameters" in tensor else None
    if size is not None and (type(size) is not int or math.prod(shape) * dtype.itemsize != size):
        raise InvalidRequestError(f"the input {name[:100]!r}, {dtype} {shape}, can't have {str(size)[:50]} bytes")
    return _Input(name, dtype, shape, size, tensor.get("data"))


def _header_length(value: bytes, size: int) -> int:
    if not value.isdigit() or len(value) > 18 or not 0 < (length := int(value)) <= size:
        raise InvalidRequestError(f"the body has {size} bytes, of which {value.decode('latin-1')[:20]} can't be JSON")
    return length


def _parameters(message: Any) -> dict[str, Any]:
    if type(message) is not dict:
        raise InvalidRequestError(f"expected an object, got {type(message).__name__}")
    parameters = message.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise InvalidRequestError(f"parameters are an object, got {type(parameters).__name__}")
    return parameters


def _shape(name: str, tensor: Mapping[str, Any]) -> list[int]:
    shape = tensor.get("shape")
    if type(shape) is list and 0 < len(shape) <= MAX_DIMENSIONS:
        for size in shape:
            if type(size) is not int or not 0 <= size < 2**31:
                break
        else:
            return shape
    raise InvalidRequestError(
        f"the shape of {name[:100]!r} is a list of 1 to {MAX_DIMENSIONS} integers, of which the first is the number of "
        f"rows; got {str(shape)[:100]}"
    )


def _dtype(name: str, tensor: Mapping[str, Any]) -> np.dtype[Any]:
    datatype = tensor.get("datatype")
    dtype = _DTYPES.get(datatype) if type(datatype) is str else None
    if dtype is None:
        raise InvalidRequestError(f"{name[:100]!r} is of datatype {str(datatype)[:20]!r}, not of {', '.join(_DTYPES)}")
    return dtype


def _from_json(name: str, data: Any, dtype: np.dtype[Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
    if type(data) is not list:
        raise InvalidRequestError(f'the input {name[:100]!r} has neither "data" nor "binary_data_size"')
    if dtype in _FORMATS and len(data) == math.prod(shape):
        try:
            return np.ndarray(shape, dtype, _struct(len(data), _FORMATS[dtype]).pack(*data))
        except (struct.error, ArithmeticError, ValueError):  # nested, or malformed
            pass
    if dtype.itemsize == 2 and dtype.kind == "f":
        raise InvalidRequestError(f"the input {name[:100]!r} is of FP16, which JSON has not; send it binary")
    try:
        with np.errstate(over="raise"):
            return np.array(data, dtype).reshape(shape)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise InvalidRequestError(
            f"the data of {name[:100]!r} is no {_NAMES[dtype]} of shape {shape}: {str(error)[:200]}"
        ) from None


@lru_cache(maxsize=256)
def _struct(count: int, number: str) -> struct.Struct:
    return struct.Struct(f"={count}{number}")  # native sizes would make what is too large infinite


def _from_bytes(name: str, dtype: np.dtype[Any], shape: Sequence[int], body: bytes, start: int) -> np.ndarray[Any, Any]:
    try:
        return np.ndarray(shape, dtype, body, start)
    except ValueError as error:  # one dimension is 0, and the others too large
        raise InvalidRequestError(f"there is no input {name[:100]!r} of shape {shape}: {error}") from None


def _request_id(message: Mapping[str, Any]) -> str | None:
    request_id = message.get("id")
    if request_id is not None and type(request_id) is not str:
        raise InvalidRequestError(f"the id is a string, got {type(request_id).__name__}")
    return request_id


def _deadline(parameters: Mapping[str, Any]) -> float | None:
    timeout = parameters.get("timeout")
    if timeout is None or timeout == 0:
        return None
    if type(timeout) not in (int, float) or not 0 < timeout < 1e15:
        raise InvalidRequestError(f"the timeout is a number of microseconds, got {str(timeout)[:50]}")
    return float(timeout) / 1e6


def _sequence(parameters: Mapping[str, Any]) -> tuple[str | None, bool, bool]:
    sequence_id = parameters.get("sequence_id")
    if sequence_id is None or sequence_id in (0, ""):  # Triton's names for none
        return _NO_SEQUENCE
    if type(sequence_id) not in (int, str) or len(str(sequence_id)) > 100:
        raise InvalidRequestError(f"the sequence_id is a short string, or a number, got {str(sequence_id)[:50]}")
    return str(sequence_id), parameters.get("sequence_start") is True, parameters.get("sequence_end") is True


def _outputs(message: Mapping[str, Any]) -> dict[str, bool | None] | None:
    outputs = message.get("outputs")
    if not outputs:
        return None
    if type(outputs) is not list:
        raise InvalidRequestError('"outputs" is a list of objects with a name')
    chosen: dict[str, bool | None] = {}
    for output in outputs:
        binary = _parameters(output).get("binary_data")
        if type(name := output.get("name")) is not str:
            raise InvalidRequestError('"outputs" is a list of objects with a name')
        chosen[name] = None if binary is None else binary is True
    return chosen


def make_rows(request: InferRequest) -> TensorDictBase | dict[str, Any]:
    """What is asked: one row by name, or a TensorDict of several. ``a.b`` is an entry of the entry ``a``."""
    if request.rows == 1:
        entries: dict[str, Any] = {}
        for name, value in request.entries.items():
            _put(entries, name, value[0])
        return entries
    td = TensorDict({}, batch_size=[request.rows])
    for name, value in request.entries.items():
        key = tuple(name.split(".")) if "." in name else name
        td.set(key, torch.from_numpy(np.require(value, requirements="W")))
    return td


def _put(entries: dict[str, Any], name: str, value: Any) -> None:
    while "." in name:
        above, _, name = name.partition(".")
        entries = entries.setdefault(above, {})
        if type(entries) is not dict:
            raise InvalidRequestError(f"{above!r} is an entry, and has entries")
    entries[name] = value


def encode(request: InferRequest, model_name: str, reply: TensorDictBase) -> tuple[bytes, int | None]:
    """Write a reply. Values that are not finite are ``null`` in JSON, which has none.

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
    arrays = arrays_of(reply)
    chosen = dict.fromkeys(arrays, request.binary) if request.outputs is None else request.outputs
    outputs: list[_Output] = []
    data: list[np.ndarray[Any, Any]] = []
    tail: list[bytes] = []
    for name, choice in chosen.items():
        array = arrays.get(name)
        if array is None:
            raise InvalidRequestError(f"there is no output {name[:100]!r}, there are {', '.join(arrays)}")
        binary = request.binary if choice is None else choice
        outputs.append((name, array.dtype, array.shape, binary))
        if binary:
            tail.append(array.tobytes())
        else:
            data.append(array.ravel())
    first, *others = _json_around_data(model_name, tuple(outputs), not reply.batch_dims)
    parts = [first]
    for array, text in zip(data, others, strict=True):
        parts += to_json(array), text
    parts.append(b"}" if request.request_id is None else b',"id":%b}' % to_json(request.request_id))
    head = b"".join(parts)
    return (head, None) if not tail else (b"".join([head, *tail]), len(head))


@lru_cache(maxsize=256)
def _json_around_data(model_name: str, outputs: tuple[_Output, ...], of_one_row: bool) -> Sequence[bytes]:
    """The JSON of a reply, of which most are alike, but for data, the id, and the last bracket.

    Args:
        model_name: of this server.
        outputs: of the reply.
        of_one_row: whether their shapes lack the dimension of the rows.

    Returns:
        What stands before the data of each output that is not binary, and behind the last.
    """
    around: list[bytes] = []
    text = to_json({"model_name": model_name, "model_version": _VERSION})[:-1] + b',"outputs":['
    for index, (name, dtype, shape, binary) in enumerate(outputs):
        datatype = _NAMES.get(dtype)
        if datatype is None:
            raise ModelError(f"the output {name!r} has dtype {dtype}, of which the protocol knows nothing")
        if of_one_row:
            shape = (1, *shape)
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if binary:
            tensor["parameters"] = {"binary_data_size": math.prod(shape) * dtype.itemsize}
        text += (b"," if index else b"") + to_json(tensor)
        if not binary:
            around.append(text[:-1] + b',"data":')
            text = b"}"
    return [*around, text + b"]"]


def arrays_of(reply: TensorDictBase, above: str = "") -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a reply as arrays, by name; those of an entry ``a`` are ``a.b``."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in entries_of(reply).items():
        if type(value) is torch.Tensor:
            arrays[above + name] = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
        elif isinstance(value, TensorDictBase):
            arrays |= arrays_of(value, f"{above}{name}.")
    return arrays


class OpenInferenceEndpoint(InferEndpoint[InferRequest]):
    """``POST /v2/models/{name}/infer``.

    Attributes:
        inputs: of the latest request with other entries than before that was answered; ``None`` before the first.
        outputs: the entries of its reply.
    """

    protocol = "open-inference"

    def __init__(self, front: Front) -> None:
        super().__init__(front)
        self.inputs: list[dict[str, Any]] | None = None
        self.outputs: list[dict[str, Any]] | None = None

    def decode(self, headers: Headers, body: bytes) -> InferRequest:
        return decode(body, headers.get(HEADER_LENGTH))

    def submit(self, request: InferRequest, size: int, received_at: float) -> PendingReply:
        session = None
        if request.sequence_id is not None:
            session = self._front.sessions.find(request.sequence_id)
            if request.sequence_start:
                session.reset()
        pending = self._front.submit(
            make_rows(request),
            protocol=self.protocol,
            size=size,
            received_at=received_at,
            deadline=request.deadline,
            session=session,
        )
        if request.sequence_end and request.sequence_id is not None:
            self._front.sessions.forget(request.sequence_id)
        return pending

    def plain_entries(self, request: InferRequest) -> TensorDictBase | dict[str, Any] | None:
        return make_rows(request) if request.deadline is None and request.sequence_id is None else None

    def encode(self, request: InferRequest, reply: TensorDictBase) -> Response:
        if self.inputs is None or len(self.inputs) != len(request.entries):
            self.inputs = [_tensor(name, array.dtype, array.shape[1:]) for name, array in request.entries.items()]
            own = reply.batch_dims
            self.outputs = [_tensor(name, array.dtype, array.shape[own:]) for name, array in arrays_of(reply).items()]
        body, head = encode(request, self._front.name, reply)
        return Response(body) if head is None else Response(body, (_OCTETS, (HEADER_LENGTH, b"%d" % head)))


def _tensor(name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "datatype": _NAMES.get(dtype, ""), "shape": [-1, *shape]}


def open_inference_routes(monitor: Monitor, infer: OpenInferenceEndpoint) -> list[BaseRoute]:
    """The ``GET`` endpoints: of the server, and of its one model.

    Args:
        monitor: knows whether the server is ready.
        infer: knows what requests and replies look like.
    """
    front = monitor.front

    async def live(_: Request) -> Response_:
        return JSONResponse({"live": True})

    async def ready(_: Request) -> Response_:
        reason = monitor.trouble(await monitor.read())
        about = {"live": True, "ready": not reason, "name": front.name}
        return JSONResponse(about if not reason else {**about, "error": reason}, 503 if reason else 200)

    async def server(_: Request) -> Response_:
        extensions = ["binary_tensor_data", "schedule_policy", "sequence", "parameters"]
        return JSONResponse({"name": "aioinfer", "version": version("aioinfer"), "extensions": extensions})

    async def model(_: Request) -> Response_:
        inputs = infer.inputs or [{"name": name, "datatype": "", "shape": [-1]} for name in sorted(front.in_keys)]
        about = {"name": front.name, "versions": [_VERSION], "platform": "pytorch", "inputs": inputs}
        return JSONResponse({**about, "outputs": infer.outputs or []})

    async def unknown(request: Request) -> Response_:
        what = f"the policy is {front.name!r}, of version {_VERSION!r}"
        return JSONResponse({"error": f"there is nothing at {request.url.path[:200]!r}; {what}"}, 404)

    path = f"/v2/models/{front.name}"
    return [
        Route("/v2", server),
        Route("/v2/", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        *(
            route
            for model_path in (path, f"{path}/versions/{_VERSION}")
            for route in (Route(model_path, model), Route(f"{model_path}/ready", ready))
        ),
        Route("/v2/{rest:path}", unknown, methods=["GET", "POST"]),
    ]
