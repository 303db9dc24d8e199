"""``POST /act``: JSON for curl and scripts, nested lists in and out."""

from __future__ import annotations

import json
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import InvalidRequestError
from aioinfer.web.asgi import Headers
from aioinfer.web.backend import PendingReply
from aioinfer.web.http import InferEndpoint, Response, parse_json

__all__ = ["ActEndpoint"]


class ActEndpoint(InferEndpoint[dict[str, Any]]):
    """``{"observation": [...]}`` gets ``{"action": [...]}``."""

    protocol = "act"

    def decode(self, headers: Headers, body: bytes) -> dict[str, Any]:
        entries = parse_json(body)
        if not isinstance(entries, dict):
            raise InvalidRequestError(f"a request is an object, got {type(entries).__name__}")
        return entries

    def submit(self, request: dict[str, Any], size: int, received_at: float) -> PendingReply:
        return self._front.submit(request, protocol=self.protocol, size=size, received_at=received_at)

    def encode(self, request: dict[str, Any], reply: TensorDictBase) -> Response:
        return Response(json.dumps({name: value.tolist() for name, value in reply.items()}).encode())
