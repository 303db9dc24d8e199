"""The protocol of robots, openpi's: WebSocket messages of msgpack.

Clients of openpi, RoboArena, vLLM-Omni and SGLang speak it. The first message is the server's: its metadata. Then each
observation gets one reply, in the order in which they came: a map in a binary message, or an error as text, after which the connection goes on. A message with an ``"endpoint"`` is of
RoboArena's dialect: ``infer`` gets the bare actions, ``reset`` a text.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from enum import Enum
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import InvalidRequestError
from aioinfer.web.arrays import packb, unpackb
from aioinfer.web.asgi import Disconnected
from aioinfer.web.backend import PendingReply
from aioinfer.web.front import Front
from aioinfer.web.sessions import Session
from aioinfer.web.websocket import GOING_AWAY, WebSocketConnection, WebSocketSession

__all__ = ["Dialect", "RobotSession"]

_MOST_PENDING = 16  # requests of a session, whose replies its caller has not waited for


class Dialect(Enum):
    """Whose clients a path is for."""

    OPENPI = "openpi"
    VLLM_OMNI = "vllm-omni"
    SGLANG = "sglang"


class RobotSession(WebSocketSession):
    """One connection of a robot: what it asks is answered in order.

    Args:
        connection: not accepted yet.
        front: answers.
        dialect: of the path.
    """

    protocol = "openpi"

    def __init__(self, connection: WebSocketConnection, front: Front, dialect: Dialect) -> None:
        super().__init__(connection)
        self._front = front
        self._dialect = dialect
        self._session = Session()
        self._pending: deque[tuple[PendingReply, bool] | bytes | str] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._previous_seconds: float | None = None

    async def run(self) -> None:
        """Serve until the caller goes."""
        await self.connection.accept()
        await self.connection.send(packb(dict(self._front.metadata)))
        writing = asyncio.create_task(self._write())
        try:
            while True:
                message = await self.connection.receive()
                self._add(self._take(message))
                while len(self._pending) > _MOST_PENDING:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._session.cancel()
            writing.cancel()
            await asyncio.wait([writing])

    async def drain(self) -> None:
        while self._pending:
            self._room.clear()
            await self._room.wait()
        await self.connection.close(GOING_AWAY, self._front.draining)

    def _add(self, item: tuple[PendingReply, bool] | bytes | str) -> None:
        self._pending.append(item)
        self._changed.set()

    def _take(self, message: bytes | str) -> tuple[PendingReply, bool] | bytes | str:
        received_at = time.perf_counter()
        try:
            if isinstance(message, str):
                raise InvalidRequestError("an observation is a binary message of msgpack, this is text")
            entries = unpackb(message)
            if not isinstance(entries, dict):
                raise InvalidRequestError(f"an observation is a map, got {type(entries).__name__}")
            endpoint = entries.pop("endpoint", None)
            if endpoint == "reset":
                return self._reset()
            if endpoint not in (None, "infer"):
                raise InvalidRequestError(f'the endpoint is "infer" or "reset", got {str(endpoint)[:50]!r}')
            pending = self._front.submit(
                entries, protocol=self.protocol, size=len(message), received_at=received_at, session=self._session
            )
        except Exception as error:
            self._front.count_refusal(self.protocol, error)
            return self._front.failure_of(error).message
        return pending, endpoint is not None or self._dialect is Dialect.VLLM_OMNI

    def _reset(self) -> bytes | str:
        if self._dialect is Dialect.VLLM_OMNI:
            return packb({"status": "reset successful"})
        return "reset successful"

    async def _write(self) -> None:
        try:
            while True:
                if not self._pending:
                    self._changed.clear()
                    await self._changed.wait()
                item = self._pending[0]
                if isinstance(item, tuple):
                    item = await self._reply(*item)
                await self.connection.send(item)
                self._pending.popleft()
                self._room.set()
        except Disconnected:
            pass  # the task that receives is told

    async def _reply(self, pending: PendingReply, bare: bool) -> bytes | str:
        try:
            reply = to_entries(await pending.reply())
            if bare:
                return packb(reply["actions"])
            seconds = time.perf_counter() - pending.received_at
            timing = {"infer_ms": seconds * 1000}
            if self._previous_seconds is not None:
                timing["prev_total_ms"] = self._previous_seconds * 1000
            self._previous_seconds = seconds
            return packb({**reply, "server_timing": timing})
        except Exception as error:
            return self._front.failure_of(error).message


def to_entries(reply: TensorDictBase) -> dict[str, Any]:
    """The entries of a reply to one row: arrays, and numbers where they are of no dimension."""
    entries: dict[str, Any] = {}
    for name, value in reply.items():
        if isinstance(value, TensorDictBase):
            entries[name] = to_entries(value)
        else:
            entries[name] = value.item() if value.ndim == 0 else value.numpy()
    return entries
