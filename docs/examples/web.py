"""A web backend with an endpoint of its own, which serves a policy under ``/policy``: HTTP, robots, and metrics."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
import uvicorn
from fastapi import FastAPI
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.web import create_app


def make_app(policy: Callable[[TensorDictBase], TensorDictBase], max_pending: int = 256) -> FastAPI:
    example = TensorDict({"observation": torch.zeros(4)})
    server = InferenceServer(policy, ThreadingTransport(), max_pending=max_pending, request_spec=example)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server:
            yield

    app = FastAPI(lifespan=lifespan)
    app.state.server = server

    @app.get("/episode")
    async def play() -> dict[str, float]:
        """Use the policy in a handler: its requests meet those of ``/policy`` in one batch."""
        client, observation = server.async_client(), torch.zeros(4)
        for _ in range(10):
            reply = await client(observation=observation)
            observation = observation + 0.1 * reply["action"].mean()
        return {"distance": float(observation.norm())}

    app.mount("/policy", create_app(server))
    return app


def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    uvicorn.run(make_app(policy), port=8000, ws_per_message_deflate=False)


if __name__ == "__main__":
    main()
