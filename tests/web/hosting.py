"""An app under uvicorn, on the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from aioinfer.serve.listener import bind
from tests.limits import HANG


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
    config = uvicorn.Config(app, **{"ws": "websockets-sansio", "lifespan": "on", "log_level": "warning", **options})
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
