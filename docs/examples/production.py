"""SIGTERM ends a server in good order: it refuses new requests, serves the pending ones, and answers probes."""

import asyncio
import os
import signal

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, InferenceServer, ServerClosedError, ThreadingTransport


def probe(server: InferenceServer) -> str:
    """What an endpoint for an orchestrator answers: ``alive`` for liveness, ``ready`` for readiness."""
    health = server.health()
    return f"alive: {health.alive}, ready: {health.ready}, reason: {health.reason or 'none'}"


async def ask_for_ever(client: AsyncInferenceClient) -> int:
    replies = 0
    try:
        while True:
            await client(TensorDict({"observation": torch.randn(4)}))
            replies += 1
    except ServerClosedError:
        return replies  # the server ends; a caller of one's own ends with it, or asks another server


async def serve() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    server = InferenceServer(policy, ThreadingTransport(), max_pending=256)
    async with server:
        callers = [asyncio.create_task(ask_for_ever(server.async_client())) for _ in range(16)]
        asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGTERM)  # an orchestrator does that
        await asyncio.sleep(0.2)
        print("before:", probe(server))
        await stop.wait()
        await server.aclose(timeout=10.0, drain=True)  # in less time than the orchestrator grants
        print("after: ", probe(server))
        stats, replies = server.stats(), sum(await asyncio.gather(*callers))
    print("every reply arrived:", stats.ok == replies)


if __name__ == "__main__":
    asyncio.run(serve())
