"""Servers that ours is compared with. Each uses the public interface of its library alone."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from aioinfer.bench.workloads import MAX_BATCH_SIZE

__all__ = ["echo", "serve_litserve", "serve_mosec", "serve_openpi"]

_HOST = "127.0.0.1"


def serve_openpi(policy: TensorDictModule, port: int) -> None:
    """What openpi's server does: it computes one observation after the other, on its event loop."""
    from websockets.asyncio.server import ServerConnection, serve

    from aioinfer.web.arrays import packb, unpackb

    async def answer(connection: ServerConnection) -> None:
        await connection.send(packb({}))
        previous: float | None = None
        while True:
            message = await connection.recv(decode=False)
            received_at = time.perf_counter()
            entries = {name: torch.from_numpy(value.copy()) for name, value in unpackb(message).items()}
            began_at = time.perf_counter()
            with torch.no_grad():
                actions = policy(TensorDict(entries))["actions"].numpy()
            timing = {"infer_ms": (time.perf_counter() - began_at) * 1e3}
            if previous is not None:
                timing["prev_total_ms"] = previous * 1e3
            await connection.send(packb({"actions": actions, "server_timing": timing}))
            previous = time.perf_counter() - received_at

    async def run() -> None:
        async with serve(answer, _HOST, port, compression=None, max_size=None) as server:
            await server.serve_forever()

    asyncio.run(run())


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An app that sends back what it gets."""
    body = (await receive())["body"]
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve_litserve(model: str, port: int) -> None:
    """LitServe: an HTTP process and a worker process."""
    from litserve import LitServer

    from aioinfer.bench.serving.litserve_api import ActAPI

    server = LitServer(ActAPI(model, max_batch_size=MAX_BATCH_SIZE, batch_timeout=0.001), accelerator="cpu")
    server.run(host=_HOST, port=port, log_level="warning", generate_client_file=False, access_log=False)


def serve_mosec(model: str, port: int) -> None:
    """Mosec: an HTTP server in Rust, and a worker process."""
    from aioinfer.bench.serving import mosec_worker

    sys.argv = [sys.argv[0], "--address", _HOST, "--port", str(port), "--log-level", "warning"]
    mosec_worker.run(model)
