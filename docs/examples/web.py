"""A policy behind HTTP: ``{"observation": [...]}`` gets ``{"action": [...]}``, by ``POST /act`` or over a WebSocket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

import torch
import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    InferenceError,
    InferenceServer,
    InvalidRequestError,
    PeerDiedError,
    ServerClosedError,
    ServerOverloadedError,
    ServerPausedError,
    ThreadingTransport,
    connect,
)

T = TypeVar("T")
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


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


def serving(policy: Callable[[TensorDictBase], TensorDictBase], max_pending: int = 256) -> Lifespan:
    """Serve the policy in this process, as long as the app runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        example = TensorDict({"observation": torch.zeros(4)})
        async with InferenceServer(
            policy, ThreadingTransport(), max_pending=max_pending, request_spec=example
        ) as app.state.server:
            app.state.client = app.state.server.async_client()
            yield

    return lifespan


def connected(address: str) -> Lifespan:
    """Use the server of another program, whose transport is an ``MPTransport`` that listens at this address."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        remote = await asyncio.to_thread(connect, address)
        async with remote.async_client() as app.state.client:
            yield

    return lifespan


def make_app(lifespan: Lifespan) -> FastAPI:
    """Build the app, on a lifespan that sets ``app.state.client``."""
    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(InvalidRequestError, refuse(422))
    app.add_exception_handler(ServerOverloadedError, refuse(429, {"Retry-After": "1"}))
    app.add_exception_handler(ServerPausedError, refuse(503, {"Retry-After": "1"}))
    app.add_exception_handler(ServerClosedError, refuse(503))
    app.add_exception_handler(PeerDiedError, refuse(503))  # the server was in another process
    app.add_exception_handler(CallerGoneError, refuse(499))  # nobody reads it

    @app.post("/act")
    async def act(body: Observation, request: Request) -> Action:
        reply = await while_connected(request, app.state.client.submit(observation=body.observation))
        return Action(action=reply["action"].tolist())

    @app.websocket("/act")
    async def act_in_turn(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            try:
                body = Observation.model_validate_json(text)
                reply = await app.state.client(observation=body.observation)
            except (ValidationError, InferenceError) as error:
                await socket.send_json({"detail": str(error)})
            else:
                await socket.send_json({"action": reply["action"].tolist()})

    return app


def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    uvicorn.run(make_app(serving(policy)), port=8000)


if __name__ == "__main__":
    main()
