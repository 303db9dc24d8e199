"""The app: which path is served by what, and what holds for all of them."""
from __future__ import annotations

import time
from typing import Any

from aioinfer.web.backend import Backend
from aioinfer.web.failures import failure_of
from aioinfer.web.http import headers_of, read_body, respond, respond_json
from aioinfer.web.open_inference import HEADER_LENGTH, decode, encode, make_rows
from aioinfer.web.openpi import Dialect, RobotSession
from aioinfer.web.stream import StreamSession
from aioinfer.web.websocket import WebSocketConnection


def create_app(server: Any, metadata: Any = {}, **kw: Any) -> Any:
    backend = Backend(server)

    async def infer(scope: Any, receive: Any, send: Any) -> None:
        received_at = time.perf_counter()
        headers = headers_of(scope)
        try:
            body = await read_body(receive, headers, max_size=1 << 26, timeout=30)
            request = decode(body, headers.get(HEADER_LENGTH))
            pending = backend.submit(make_rows(request), received_at, deadline=request.deadline)
            reply = await pending.reply()
            data, head = encode(request, "policy", reply)
        except Exception as error:
            f = failure_of(error)
            await respond_json(send, f.status, {"error": f.message})
            return
        if head is None:
            await respond(send, 200, [(b"content-type", b"application/json")], data)
        else:
            await respond(
                send, 200, [(b"content-type", b"application/octet-stream"), (HEADER_LENGTH, b"%d" % head)], data
            )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                m = await receive()
                await send({"type": m["type"] + ".complete"})
                if m["type"] == "lifespan.shutdown":
                    return
        if scope["type"] == "websocket":
            c = WebSocketConnection(receive, send, max_message_size=1 << 26, stall_timeout=10)
            if scope["path"] == "/v1/stream":
                await StreamSession(c, server.async_client()).run()
                return
            await RobotSession(c, backend, Dialect.OPENPI, metadata).run()
        elif scope["path"] == "/echo":
            m = await receive()
            body = m["body"]
            await respond(send, 200, [(b"content-type", b"application/octet-stream")], body)
        else:
            await infer(scope, receive, send)

    return app
