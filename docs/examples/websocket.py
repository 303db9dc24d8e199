"""A WebSocket backend of one's own: each connection sends observations, and gets an action for each of them."""

import asyncio
import json

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from aioinfer import AsyncInferenceClient, InferenceError, InferenceServer, ThreadingTransport


async def answer(connection: ServerConnection, client: AsyncInferenceClient) -> None:
    """Serve one connection, one message after the other, until its caller goes away."""
    async for message in connection:
        try:
            reply = await client(observation=json.loads(message)["observation"], timeout=1.0)
            result = {"action": reply["action"].tolist()}
        except (InferenceError, TimeoutError) as error:  # full, paused, closed; or a wrong shape; or too late
            result = {"error": type(error).__name__, "detail": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            result = {"error": "BadMessage", "detail": repr(error)}
        await connection.send(json.dumps(result))


async def ask(port: int, observation: list[float]) -> None:
    """What a robot or a game does, in a program of its own."""
    async with connect(f"ws://localhost:{port}") as connection:
        await connection.send(json.dumps({"observation": observation}))
        print(await connection.recv())


async def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    example = TensorDict({"observation": torch.zeros(4)})
    async with InferenceServer(policy, ThreadingTransport(), max_pending=256, request_spec=example) as server:
        client = server.async_client()
        async with serve(lambda connection: answer(connection, client), "localhost", 0) as backend:
            port = backend.sockets[0].getsockname()[1]
            await asyncio.gather(*(ask(port, [float(number)] * 4) for number in range(3)), ask(port, [1.0]))


if __name__ == "__main__":
    asyncio.run(main())
