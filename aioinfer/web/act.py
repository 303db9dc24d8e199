"""``POST /act``: JSON for curl and scripts, nested lists in and out.

The body is an object of entries: numbers, nested lists of them, objects of entries, and texts. Where the server has a
``request_spec``, numbers get its dtypes; elsewhere those that :class:`Client` gives them: float32, int64, bool. Entries
that the policy does not read are left out. The reply is an object of the policy's outputs, as nested lists; texts are
strings, and numbers that are not finite are ``null``, for JSON has none.

::

    curl http://localhost:8000/act -d '{"observation": [0.1, 0.2, 0.3, 0.4]}'
    {"action": [0.7, -0.1], "policy_version": 0}

Two entries of the body are for the app; the policy gets them too where it is known to read them:

* ``"session_id"``, a string: requests that have the same one are of one session, which starts with the first of them.
* ``"reset": true``: the session of this request starts anew with it.

The header ``X-Deadline-Seconds`` says within how many seconds from its arrival a request is of use; a reply that can't
be there by then is a 504, and is not computed.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase, is_non_tensor

from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.tensors import entries as entries_of
from aioinfer.tensors import is_nested
from aioinfer.web.asgi import Headers
from aioinfer.web.backend import PendingReply
from aioinfer.web.http import InferEndpoint, Response, parse_json, to_json

__all__ = ["ActEndpoint", "ActRequest"]

_DEADLINE = b"x-deadline-seconds"
_SECONDS = re.compile(rb"\d{1,9}(\.\d{0,9})?|\.\d{1,9}")
_LONGEST_NAME = 256  # of a session


class ActRequest(NamedTuple):
    """A request.

    Attributes:
        entries: of one row.
        deadline: seconds; ``None``: it names none.
        session_id: the session that it names.
        reset: whether that starts anew.
    """

    entries: dict[str, Any]
    deadline: float | None
    session_id: str | None
    reset: bool


class ActEndpoint(InferEndpoint[ActRequest]):
    """``{"observation": [...]}`` gets ``{"action": [...]}``."""

    protocol = "act"

    def decode(self, headers: Headers, body: bytes) -> ActRequest:
        entries = parse_json(body)
        if type(entries) is not dict:
            raise InvalidRequestError(f"a request is an object, got {type(entries).__name__}")
        deadline = headers.get(_DEADLINE)
        session_id = entries.get("session_id")
        if session_id is None:
            return ActRequest(entries, None if deadline is None else _seconds(deadline), None, False)
        if type(session_id) is not str or not 0 < len(session_id) <= _LONGEST_NAME:
            raise InvalidRequestError(
                f"a session_id is a string of 1 to {_LONGEST_NAME} characters, got {str(session_id)[:50]!r}"
            )
        reset = entries.get("reset", False)
        if type(reset) is not bool:
            raise InvalidRequestError(f"reset is true or false, got {str(reset)[:50]!r}")
        for name in ("session_id", "reset"):
            if name not in self._front.in_keys:
                entries.pop(name, None)
        return ActRequest(entries, None if deadline is None else _seconds(deadline), session_id, reset)

    def submit(self, request: ActRequest, size: int, received_at: float) -> PendingReply:
        session = None
        if request.session_id is not None:
            session = self._front.sessions.find(request.session_id)
            if request.reset:
                session.reset()
        try:
            return self._front.submit(
                request.entries,
                protocol=self.protocol,
                size=size,
                received_at=received_at,
                deadline=request.deadline,
                session=session,
            )
        except RecursionError:
            raise InvalidRequestError("the entries are nested too deeply") from None

    def plain_entries(self, request: ActRequest) -> dict[str, Any] | None:
        return request.entries if request.deadline is None and request.session_id is None else None

    def encode(self, request: ActRequest, reply: TensorDictBase) -> Response:
        try:
            return Response(to_json(_plain(reply)))
        except TypeError as error:
            raise ModelError(f"JSON can't carry the reply: {error}") from None


def _seconds(value: bytes) -> float:
    if _SECONDS.fullmatch(value) is None or not (seconds := float(value)):
        raise InvalidRequestError(
            f"X-Deadline-Seconds is a number of seconds above 0, got {value[:50].decode('latin-1')!r}"
        )
    return seconds


def _plain(reply: TensorDictBase) -> dict[str, Any]:
    """The entries of a reply: contiguous arrays of dtypes that numpy has, numbers, texts, and mappings of them."""
    return {name: _value(value) for name, value in entries_of(reply).items()}


def _value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            return value.item()
        return np.ascontiguousarray((value.float() if value.dtype is torch.bfloat16 else value).numpy())
    if is_nested(value):
        return _plain(value)
    return value.tolist() if is_non_tensor(value) else value
