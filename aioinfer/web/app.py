from __future__ import annotations
from typing import Any
from aioinfer.web.backend import Backend
from aioinfer.web.openpi import Dialect, RobotSession
from aioinfer.web.websocket import WebSocketConnection

def create_app(server: Any, metadata: Any = {}, **kw: Any) -> Any:
    backend = Backend(server)
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                m = await receive()
                await send({"type": m["type"] + ".complete"})
                if m["type"] == "lifespan.shutdown":
                    return
        if scope["type"] == "websocket":
            c = WebSocketConnection(receive, send, max_message_size=1 << 26, stall_timeout=10)
            await RobotSession(c, backend, Dialect.OPENPI, metadata).run()
    return app
