"""A policy behind HTTP: ``POST /act`` with ``{"observation": [...]}`` answers ``{"action": [...]}``."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, InvalidRequestError, ServerClosedError, ServerOverloadedError, ThreadingTransport

T = TypeVar("T")


class Observation(BaseModel):
    """What a caller posts."""

    observation: list[float]


class Action(BaseModel):
    """What a caller gets."""

    action: list[float]


class CallerGoneError(Exception):
    """The HTTP client went away before its reply was there."""


async def while_connected(request: Request, reply: asyncio.Future[T]) -> T:
    """Await a reply, but withdraw its request as soon as the HTTP client disconnects.

    The web server does not cancel a handler whose client is gone, so the handler must watch for it.
    """
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((reply, gone), return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            raise CallerGoneError
        return reply.result()
    finally:
        reply.cancel()  # changes nothing once the reply is there
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refuse(status: int, headers: dict[str, str] | None = None) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Make a handler that answers an exception with an HTTP status."""

    async def answer(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, status, headers)

    return answer


def make_app(policy: Callable[[TensorDictBase], TensorDictBase], max_pending: int = 256) -> FastAPI:
    """Build the app; the server lives as long as the app runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        example = TensorDict({"observation": torch.zeros(4)})
        async with InferenceServer(
            policy, ThreadingTransport(), max_pending=max_pending, request_spec=example
        ) as app.state.server:
            app.state.client = app.state.server.async_client()
            yield

    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(InvalidRequestError, refuse(422))
    app.add_exception_handler(ServerOverloadedError, refuse(429, {"Retry-After": "1"}))
    app.add_exception_handler(ServerClosedError, refuse(503))
    app.add_exception_handler(CallerGoneError, refuse(499))  # nobody reads it

    @app.post("/act")
    async def act(body: Observation, request: Request) -> Action:
        td = TensorDict({"observation": torch.tensor(body.observation)})
        reply = await while_connected(request, app.state.client.submit(td))
        return Action(action=reply["action"].tolist())

    return app


def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    uvicorn.run(make_app(policy), port=8000)


if __name__ == "__main__":
    main()
