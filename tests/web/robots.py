"""A robot that speaks openpi's protocol as openpi's client does, and a policy for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import numpy as np
from tensordict import TensorDict, TensorDictBase
from websockets.asyncio.client import ClientConnection, connect

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.web.app import App, create_app
from tests.limits import HANG
from tests.web.hosting import hosted

HORIZON, ACTION_DIM = 10, 7


def pack(value: Any) -> bytes:
    """Pack as openpi's client does."""
    packed: bytes = msgpack.packb(value, default=_pack_array)
    return packed


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def unpack(message: bytes) -> Any:
    """Unpack as openpi's client does."""
    return msgpack.unpackb(message, object_hook=_unpack_array)


def _unpack_array(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    return value


def observation(value: float, **more: Any) -> dict[str, Any]:
    """What a robot sees."""
    return {"state": np.full(8, value, np.float32), **more}


def act(td: TensorDictBase) -> TensorDictBase:
    """A policy: all actions ``[10, 7]`` are twice the first element of the state."""
    actions = (2 * td["state"][:, :1, None]).expand(-1, HORIZON, ACTION_DIM)
    return TensorDict({"actions": actions.contiguous()}, td.batch_size)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(HANG):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class Robot:
    """One connection to a server.

    Args:
        socket: that has received nothing yet.
    """

    def __init__(self, socket: ClientConnection, metadata: Any) -> None:
        self.socket = socket
        self.metadata = metadata

    async def send(self, message: Any) -> None:
        """Send a message, packed."""
        await self.socket.send(pack(message))

    async def receive(self) -> Any:
        """What the next message has; a text is one."""
        message = await self.socket.recv()
        return message if isinstance(message, str) else unpack(message)

    async def ask(self, message: Any) -> Any:
        """Send a message and receive its reply."""
        await self.send(message)
        return await self.receive()

    async def act(self, value: float, **more: Any) -> None:
        """Ask for actions, and check that they are those of the observation."""
        self.check(await self.ask(observation(value, **more)), value)

    @staticmethod
    def check(reply: Any, value: float) -> None:
        """Check that a reply is that of :func:`act` to ``observation(value)``."""
        assert isinstance(reply, dict), reply
        assert reply["actions"].shape == (HORIZON, ACTION_DIM)
        assert (reply["actions"] == 2 * value).all()


@asynccontextmanager
async def robot(url: str, path: str = "/", **options: Any) -> AsyncIterator[Robot]:
    """Connect inside an ``async with`` block, as openpi's client does."""
    async with connect(
        url.replace("http", "ws") + path, compression=None, max_size=None, open_timeout=HANG, **options
    ) as socket:
        greeting = await socket.recv()
        assert isinstance(greeting, bytes)
        yield Robot(socket, unpack(greeting))


@asynccontextmanager
async def served(
    policy: Callable[[TensorDictBase], TensorDictBase] = act, **options: Any
) -> AsyncIterator[tuple[App, str]]:
    """Serve a policy inside an ``async with`` block: the app, and where it is."""
    server = InferenceServer(policy, ThreadingTransport())
    app = create_app(server, **options)
    async with hosted(app) as url:
        yield app, url
