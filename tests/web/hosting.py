"""An app under uvicorn, on the test's own event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn

from aioinfer.serve.listener import bind
from tests.limits import HANG

KEEP_ALIVE = 3600  # seconds: else a caller that is suspended for a while asks as its connection is closed


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that no stranger gets, where one server may come after the other."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@asynccontextmanager
async def hosted(app: Any, *, port: int = 0, **options: Any) -> AsyncIterator[str]:
    """Serve an app inside an ``async with`` block.

    Args:
        app: any ASGI app; its lifespan is that of the block.
        port: of 127.0.0.1; 0 takes one that is free.
        options: of ``uvicorn.Config``.

    Returns:
        Where it is: ``http://127.0.0.1:port``.
    """
    (listener,) = bind("127.0.0.1", port)
    usual = {"ws": "websockets-sansio", "lifespan": "on", "log_level": "warning", "timeout_keep_alive": KEEP_ALIVE}
    config = uvicorn.Config(app, **{**usual, **options})
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(HANG):
            while not server.started and not serving.done():  # noqa: ASYNC110 - it sets no event
                await asyncio.sleep(0.001)
        assert server.started, "the app did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(HANG):
            await serving
        listener.close()
